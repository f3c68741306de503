"""LayerDrop, stacking and random widths: their paths, growths and learning rates, by hand."""

import math

import numpy as np
import pytest

from raptr_ds.paths import LayerPath
from raptr_ds.paths.growth import Growth
from tests.path_methods import path_method


def build(method, num_layers=12, num_steps=90, **values):
    return path_method(method, num_layers=num_layers, num_steps=num_steps, seed=3, **values)


@pytest.mark.parametrize(
    ("before", "after", "sources"),
    [
        (6, 9, {6: 3, 7: 4, 8: 5}),
        (9, 12, {9: 6, 10: 7, 11: 8}),
        (6, 12, {6: 0, 7: 1, 8: 2, 9: 3, 10: 4, 11: 5}),
        (3, 4, {3: 2}),
        (2, 7, {2: 0, 3: 1, 4: 0, 5: 1, 6: 0}),
    ],
)
def test_new_layers_are_copies_of_the_topmost(before, after, sources):
    assert Growth(tuple(range(before)), tuple(range(after))).sources == sources


def test_stacking_trains_the_first_layers_and_grows_between_phases():
    method = build("stacking", schedule="6-9-12", growth_optimizer_state="fresh")
    lengths = [method.path_at(step).length for step in range(90)]
    assert lengths == [6] * 30 + [9] * 30 + [12] * 30
    assert method.path_at(0).layers == tuple(range(6))
    assert method.path_at(45) == method.model_at(45)
    growths = {step: method.growth_at(step) for step in range(92) if method.growth_at(step)}
    six, nine, twelve = (tuple(range(length)) for length in (6, 9, 12))
    assert growths == {
        30: Growth(six, nine, copies_optimizer_state=False),
        60: Growth(nine, twelve, copies_optimizer_state=False),
    }
    assert method.expected_layers_from(0) == sum(lengths)
    assert method.expected_layers_from(50) == sum(lengths[50:])
    assert method.marginals_at(40).tolist() == [1.0] * 9 + [0.0] * 3
    assert [method.learning_rate_factor_at(step) for step in (0, 29, 30, 60, 89)] == [1.0] * 5


def test_phases_without_steps_are_grown_over_and_equal_ones_do_not_grow():
    method = build("stacking", num_steps=2, schedule="3-6-9-12")
    assert [phase.num_steps for phase in method.phases] == [1, 0, 1, 0]
    assert method.growth_at(1) == Growth((0, 1, 2), tuple(range(9)))
    twice = build("stacking", schedule="6-6-12")
    assert [step for step in range(90) if twice.growth_at(step)] == [60]


@pytest.mark.parametrize(
    ("schedule", "order"),
    [
        ("3-6-9-12", "0 1 2 0 1 2 0 1 2 0 1 2"),
        ("1-2-3-4-5-6", "0 0 0 0 0 0"),
        ("4-6-8", "0 1 0 1 0 1 2 3"),
        ("6-8-10", "0 1 2 3 2 3 2 3 4 5"),
        ("3-4-5", "0 1 1 1 2"),
        ("2-7", "0 1 0 1 0 1 0"),
    ],
)
def test_the_middle_block_is_repeated_in_its_place(schedule, order):
    """Against lists of layers into which copies of the middle block are inserted."""
    lengths = [int(length) for length in schedule.split("-")]
    method = build("stacking", num_layers=lengths[-1], schedule=schedule, growth_position="middle")
    held = {layer: str(number) for number, layer in enumerate(method.path_at(0).layers)}
    for phase in method.phases[1:]:
        growth = method.growth_at(phase.first_step)
        assert growth is not None
        held |= {layer: held[source] for layer, source in growth.sources.items()}
        assert tuple(sorted(held)) == method.path_at(phase.first_step).layers
    assert " ".join(held[layer] for layer in sorted(held)) == order


def test_midas_keeps_the_outer_blocks_outside_and_repeats_the_middle_one():
    """By hand, four layers by one: A; A A'; A A'' A' with the first of two as the middle; then the second of three."""
    method = build(
        "stacking", num_layers=4, num_steps=100, schedule="1-2-3-4", growth_position="middle", split="power:1"
    )
    assert [phase.first_step for phase in method.phases] == [0, 10, 30, 60]
    assert [method.path_at(step).layers for step in (0, 10, 30, 60)] == [(0,), (0, 3), (0, 1, 3), (0, 1, 2, 3)]
    growths = [method.growth_at(step) for step in (10, 30, 60)]
    assert [growth.sources if growth else None for growth in growths] == [{3: 0}, {1: 0}, {2: 1}]
    assert method.marginals_at(30).tolist() == [1.0, 1.0, 0.0, 1.0]
    assert method.expected_layers_from(0) == 10 + 40 + 90 + 160


def test_new_layers_may_begin_afresh_even_without_any_before():
    method = build("stacking", schedule="0-12", split=[0.8, 0.2], growth_init="random", num_steps=50)
    assert [method.path_at(step).length for step in (0, 39, 40)] == [0, 0, 12]
    growth = method.growth_at(40)
    assert growth is not None
    assert (growth.new_layers, growth.sources) == (tuple(range(12)), {})
    assert (growth.init, growth.copies_optimizer_state) == ("random", False)


def test_the_learning_rate_rises_again_after_each_growth():
    method = build("stacking", schedule="6-9-12", growth_warmup_steps=4)
    factors = [method.learning_rate_factor_at(step) for step in range(90)]
    rise = [0.25, 0.5, 0.75, 1.0]
    assert factors == [1.0] * 30 + rise + [1.0] * 26 + rise + [1.0] * 26


def test_layerdrop_keeps_each_layer_alike_to_the_end_and_never_none():
    method = build("layerdrop", num_layers=3, num_steps=6000, layerdrop=0.6)
    paths = [method.path_at(step) for step in range(6000)]
    assert all(path.layers for path in paths)
    assert paths == [method.path_at(step) for step in range(6000)]
    kept = 0.4 / (1 - 0.6**3)
    assert method.marginals_at(0) == pytest.approx([kept] * 3, rel=1e-15)
    assert method.marginals_at(5999).sum() == pytest.approx(3 * kept, rel=1e-15)
    assert method.expected_layers_from(1000) == pytest.approx(5000 * 3 * kept, rel=1e-12)
    drawn = np.array([[path.is_active(layer) for layer in range(3)] for path in paths])
    tolerance = 4 * math.sqrt(kept * (1 - kept) / 6000)
    for half in (drawn[:3000], drawn[3000:]):
        assert np.abs(half.mean(axis=0) - kept).max() < math.sqrt(2) * tolerance
    # Layers are independent but for the empty path: two of three together with (0.4^2) / (1 - 0.6^3).
    assert abs((drawn[:, 0] & drawn[:, 2]).mean() - 0.16 / (1 - 0.6**3)) < tolerance


def test_layerdrop_scales_by_the_actual_length():
    method = build("layerdrop", layerdrop=0.25, residual_scale="sqrt")
    for path in map(method.path_at, range(50)):
        assert path.residual_scale == math.sqrt(12 / path.length)


def test_layer_dropout_is_linear_in_depth_and_falls_linearly_to_none():
    method = build("layer_dropout", num_layers=4, num_steps=4000, layer_dropout=0.6)
    for step in (0, 1000, 3999):
        falling = 1 - step / 4000
        assert method.marginals_at(step) == pytest.approx([1 - 0.6 * i / 3 * falling for i in range(4)], rel=1e-14)
    assert method.path_at(4000) == LayerPath.full(4)
    for step in (0, 1234, 3999, 4000):
        rest = sum(method.marginals_at(later).sum() for later in range(step, 4000))
        assert method.expected_layers_from(step) == pytest.approx(rest, rel=1e-12)
    assert 1 - method.expected_layers_from(0) / 16000 == pytest.approx(0.6 / 4, rel=1e-3)
    paths = [method.path_at(step) for step in range(400)]
    assert paths == [method.path_at(step) for step in range(400)]
    drawn = np.array([[path.is_active(layer) for layer in range(4)] for path in paths])
    expected = np.mean([method.marginals_at(step) for step in range(400)], axis=0)
    assert np.abs(drawn.mean(axis=0) - expected).max() < 4 * math.sqrt(0.25 / 400)
    assert build("layer_dropout", num_layers=1).path_at(0) == LayerPath.full(1)


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("layer_dropout", {}),
        ("pld", {"pld_gamma": 0.02, "residual_scale": "inverse"}),
        ("layerdrop", {"residual_scale": "inverse"}),
        ("constant", {"residual_scale": "inverse"}),
        ("raptr", {"residual_scale": "inverse", "schedule": "6-8-12"}),
        ("raptr", {"residual_scale": "inverse", "schedule": "6-8-12", "sampling": "bernoulli", "fixed_layers": (0,)}),
    ],
)
def test_inverse_scales_make_each_branch_right_in_expectation(method, keys):
    built = build(method, num_layers=12, num_steps=90, **keys)
    for step in range(0, 90, 8):
        path, marginals = built.path_at(step), built.marginals_at(step)
        factors = np.array([path.scale_of(layer) for layer in range(12)])
        assert factors * marginals == pytest.approx([1.0] * 12, rel=1e-14)
    assert build(method, **{**keys, "residual_scale": "none"}).path_at(1).layers == built.path_at(1).layers


def test_inverse_scales_of_widths_are_the_heads_by_those_that_run():
    method = build("width", num_layers=2, num_steps=20, num_heads=4, schedule="1-4", residual_scale="inverse")
    assert [method.path_at(step).residual_scale for step in (0, 19)] == [4.0, 1.0]


def test_widths_follow_the_schedule_and_draw_heads_and_blocks_apart():
    method = build("width", num_layers=3, num_steps=4000, num_heads=4, schedule="2-4", residual_scale="sqrt")
    paths = [method.path_at(step) for step in range(4000)]
    assert paths == [method.path_at(step) for step in range(4000)]
    assert all(path.layers == (0, 1, 2) and path.parts.number == 4 for path in paths)
    narrow, wide = paths[:2000], paths[2000:]
    assert {len(chosen) for path in narrow for chosen in (*path.parts.heads, *path.parts.blocks)} == {2}
    assert all(path.work == 3 and path.residual_scale == 1.0 for path in wide)
    assert {path.residual_scale for path in narrow} == {math.sqrt(2)}
    assert {path.work for path in narrow} == {1.5}
    assert (method.marginals_at(0).sum(), method.marginals_at(3999).sum()) == (1.5, 3.0)
    assert method.expected_layers_from(1000) == sum(path.work for path in paths[1000:])
    assert method.marginals_at(0).tolist() == [0.5] * 3
    for layer in range(3):
        for kind in ("heads", "blocks"):
            drawn = np.array([[n in getattr(path.parts, kind)[layer] for n in range(4)] for path in narrow])
            assert np.abs(drawn.mean(axis=0) - 0.5).max() < 4 * math.sqrt(0.25 / 2000)
    # Of 6 pairs of heads and 6 of blocks all 36 combinations come equally often: the same pair in one of six.
    same = np.mean([path.parts.heads[1] == path.parts.blocks[1] for path in narrow])
    assert abs(same - 1 / 6) < 4 * math.sqrt(5 / 36 / 2000)


def test_random_parts_are_paths_of_whose_layers_parts_run():
    keys = {"schedule": "2-3-4", "full_warmup_steps": 10, "residual_scale": "sqrt"}
    both = build("raptr", num_layers=4, num_steps=100, num_heads=4, width_schedule="1-2-4", **keys)
    alone = build("raptr", num_layers=4, num_steps=100, num_heads=4, **keys)
    paths = [both.path_at(step) for step in range(100)]
    assert paths == [both.path_at(step) for step in range(100)]
    for step, path in enumerate(paths):
        length, width = (4, 4) if step < 10 else (2 + (step - 10) // 30, (1, 2, 4)[(step - 10) // 30])
        assert path.layers == alone.path_at(step).layers
        assert [len(drawn) for drawn in path.parts.heads] == [width * path.is_active(layer) for layer in range(4)]
        assert [len(drawn) for drawn in path.parts.blocks] == [width * path.is_active(layer) for layer in range(4)]
        assert path.work == pytest.approx(length * width / 4) == pytest.approx(both.marginals_at(step).sum())
        assert path.residual_scale == pytest.approx(math.sqrt(4 / length * 4 / width))
    assert both.expected_layers_from(0) == sum(path.work for path in paths)
    assert both.expected_layers_from(33) == sum(path.work for path in paths[33:])
    inverse = build("raptr", num_layers=4, num_steps=90, num_heads=4, schedule="3-3-4", width_schedule="2-4-4",
                    residual_scale="inverse")  # fmt: skip
    assert [inverse.path_at(0).scale_of(layer) for layer in range(4)] == [2.0, 4.0, 4.0, 2.0]
    assert [inverse.path_at(89).scale_of(layer) for layer in range(4)] == [1.0] * 4


def test_widths_can_be_warmed_up_on_the_full_model():
    method = build("width", num_layers=2, num_steps=30, num_heads=4, schedule="1-4", full_warmup_steps=10)
    assert [method.path_at(step).work for step in (0, 9, 10, 19, 20, 29)] == [2.0, 2.0, 0.5, 0.5, 2.0, 2.0]
    assert [phase.path_length for phase in method.phases] == [2, 2, 2]


@pytest.mark.parametrize("method", ["full", "raptr", "pld", "constant", "layerdrop", "layer_dropout", "width"])
def test_other_methods_never_grow(method):
    built = build(method, num_heads=12)
    for step in range(0, 90, 7):
        assert built.growth_at(step) is None
        assert built.model_at(step).layers == tuple(range(12))
        assert built.learning_rate_factor_at(step) == 1.0
