"""Plans: totals against the method's own sums, memory by layout, and schedules for a wished saving."""

from dataclasses import replace
from functools import cache

import pytest

from raptr_ds.paths.balance import BalancedStages
from raptr_ds.paths.cost import StepFlops, num_parameters
from raptr_ds.planner.memory import activation_bytes, largest_micro_batch, rank_memory
from raptr_ds.planner.peak import run_peak
from raptr_ds.planner.plan import plan_run, propose_schedule
from raptr_ds.planner.step_time import Device, Layout, Setting
from tests.model_shapes import model_shape
from tests.path_methods import path_method

SHAPE = model_shape("bert", layers=12, hidden=64, heads=4, length=32, vocabulary=500, ffn=256)
LAYOUT = Layout((3, 3, 3, 3), micro_batch=2, num_micro_batches=8, data=2)


def setting_of(layout=LAYOUT, predicted=5.0, shape=SHAPE):
    return Setting(shape, layout, Device(is_gpu=False), predicted)


def raptr(**values):
    defaults = {"method": "raptr", "num_layers": 12, "num_steps": 400, "seed": 1, "schedule": "6-8-10-12"}
    return path_method(**{**defaults, **values})


@pytest.mark.parametrize(
    "method",
    [
        raptr(),
        raptr(full_warmup_steps=30, split="proportional", sampling="bernoulli"),
        path_method(method="pld", num_layers=12, num_steps=400, seed=1),
        path_method(method="full", num_layers=12, num_steps=400, seed=1),
        path_method(method="layer_dropout", num_layers=12, num_steps=400, seed=1),
        path_method("stacking", num_layers=12, num_steps=400, schedule="0-12", split=(0.8, 0.2), growth_init="zero"),
        path_method("stacking", num_layers=12, num_steps=400, schedule="1-12", split=(0.8, 0.2), growth_init="random"),
        path_method("stacking", num_layers=12, num_steps=400, growth_position="middle", split="power:1"),
        raptr(width_schedule="2-3-3-4", num_heads=4, skipped_update="zero_grad"),
    ],
)
def test_flops_are_those_that_the_run_will_count(method):
    plan = plan_run(method, setting_of())
    assert plan.num_steps == 400
    assert plan.flops == pytest.approx(StepFlops(SHAPE, 32).flops_left(method, 0, 160), rel=1e-9)
    full = path_method(method="full", num_layers=12, num_steps=400, seed=1)
    assert plan.flops_saved == pytest.approx(1 - plan.flops / StepFlops(SHAPE, 32).flops_left(full, 0, 160))
    assert (plan.flops_saved > 0.01) == (method.expected_layers_from(0) < 12 * 400)


def test_recomputation_follows_the_layers_of_a_narrow_path():
    """As the model does: 6 layers at half of their width are 6, and only phases of up to 8 keep activations."""
    method = raptr(schedule="6-12", width_schedule="2-4", num_heads=4, skipped_update="zero_grad")
    setting = replace(setting_of(Layout((12,), 2, 8, data=2, recompute=True)), keep_up_to=4)
    first, second = plan_run(method, setting).phases
    assert (first.path_length, first.width, first.layout.recompute) == (6, 0.5, True)
    assert (second.path_length, second.width, second.layout.recompute) == (12, 1.0, True)
    for phase in (first, second):
        assert phase.step_flops == setting.steps.flops(method.path_at(phase.phase.first_step), 160)
    first, second = plan_run(method, replace(setting, keep_up_to=6)).phases
    assert (first.layout.recompute, second.layout.recompute) == (False, True)


@pytest.mark.parametrize(
    ("keys", "share"),
    [
        # 80% of the steps with one layer of twelve, the others with all.
        ({"method": "stacking", "schedule": "1-12", "split": (0.8, 0.2)}, 0.8 / 12 + 0.2),
        # Phases of 1, 2, 3 and 4 tenths.
        (
            {"method": "stacking", "schedule": "3-6-9-12", "split": "power:1", "growth_position": "middle"},
            0.1 * 3 / 12 + 0.2 * 6 / 12 + 0.3 * 9 / 12 + 0.4,
        ),
        # Half of the layers with half of their heads, then all of both.
        ({"method": "raptr", "schedule": "6-12", "width_schedule": "2-4", "num_heads": 4}, (0.25 + 1) / 2),
        # The mean of a rate that is linear in depth and time is a quarter of the largest, but for the step's width.
        ({"method": "layer_dropout", "layer_dropout": 0.8}, 1 - 0.2 * 4001 / 4000),
    ],
)
def test_layers_of_the_later_rivals_cost_what_they_do_by_hand(keys, share):
    setting = setting_of()
    plan = plan_run(path_method(num_layers=12, num_steps=4000, **keys), setting)
    full, head = setting.flops(12), setting.flops(0)
    assert plan.flops / 4000 == pytest.approx(head + share * (full - head), rel=1e-9)


def test_balanced_paths_save_more_time_than_uniform_ones():
    uniform = plan_run(raptr(), setting_of())
    balanced = plan_run(raptr(sampling="balanced", stages=BalancedStages((3, 3, 3, 3))), setting_of())
    assert balanced.flops_saved == uniform.flops_saved
    assert balanced.seconds < uniform.seconds < 400 * uniform.full_step_seconds


def test_phases_without_steps_are_left_out():
    plan = plan_run(raptr(num_steps=2), setting_of())
    assert [phase.phase.num_steps for phase in plan.phases] == [1, 1]


def test_zero_stages_share_what_they_share():
    totals = num_parameters(SHAPE)

    def memory(zero, data, **values):
        layout = Layout((12,), 2, 8, data=data, zero_stage=zero, **values)
        return rank_memory(setting_of(layout), 0, 12)

    assert memory(0, 4).weights == totals * 2
    assert memory(0, 4).optimizer == totals * 12
    assert memory(0, 4, bytes_per_value=4).optimizer == totals * 8
    assert memory(1, 4).optimizer == totals * 3
    assert memory(2, 4).gradients == totals * 2 / 4
    assert memory(3, 4).weights == totals * 2 / 4 + totals * 2  # small enough for ZeRO 3 to keep it whole
    layer = 12 * SHAPE.hidden_size**2 * 2
    assert memory(3, 4, kept_whole=0).weights == pytest.approx(totals * 2 / 4 + layer, rel=0.02)
    assert memory(1, 4, tensor=2).optimizer == totals * 1.5
    assert [memory(zero, 1).total for zero in (1, 2)] == sorted(
        [memory(zero, 1).total for zero in (1, 2)], reverse=True
    )


def test_stages_hold_all_parameters_and_a_copy_of_the_tied_embedding():
    held = sum(rank_memory(setting_of(), stage, 3).weights for stage in range(4)) / 2
    assert held == num_parameters(SHAPE) + SHAPE.vocab_size * SHAPE.hidden_size


def test_activations_follow_path_micro_batches_and_recomputation():
    by_stage = [activation_bytes(setting_of(predicted=0), stage, 3) for stage in range(4)]
    assert by_stage[0] == pytest.approx(4 * by_stage[3])
    assert by_stage == sorted(by_stage, reverse=True)
    one = Layout((12,), 2, 8)
    full, half = (activation_bytes(setting_of(one, 0), 0, active) for active in (12, 6))
    assert full == 2 * half
    assert activation_bytes(setting_of(Layout((12,), 2, 8, recompute=True), 0), 0, 12) < full / 3
    peak = run_peak(raptr(), setting_of())
    assert (peak.stage, peak.num_active) == (0, 3)
    assert peak.memory.activations == by_stage[0]


@cache
def saved_at_24_layers(lengths):
    deep = setting_of(Layout((24,), 2, 8), shape=SHAPE.model_copy(update={"num_layers": 24}))
    return plan_run(raptr(num_layers=24, schedule="-".join(map(str, lengths))), deep).flops_saved


@pytest.mark.parametrize("saving", [0.1, 0.2, 0.25, 0.33])
def test_a_proposed_schedule_saves_what_was_wished(saving):
    lengths = propose_schedule(24, 2, saving, saved_at_24_layers)
    assert lengths is not None
    assert len(lengths) == 4
    assert lengths[-1] == 24
    assert list(lengths) == sorted(lengths)
    # Path lengths are whole: one layer in one of four phases is about a hundredth.
    assert saved_at_24_layers(lengths) == pytest.approx(saving, abs=0.01)


def test_a_saving_out_of_reach_has_no_schedule():
    def saved_by(lengths):
        return 1 - sum(lengths) / 48

    assert propose_schedule(12, 2, 0.25, saved_by) == (6, 8, 10, 12)
    assert propose_schedule(12, 2, 0.8, saved_by) is None
    assert propose_schedule(2, 2, 0.2, saved_by) is None


def test_micro_batches_grow_into_what_a_short_path_frees():
    layout = Layout((12,), 2, 12)

    def kept(micro_batch, path_length):
        return activation_bytes(setting_of(Layout((12,), micro_batch, 1)), 0, path_length)

    sizes = {length: largest_micro_batch(setting_of(layout), length) for length in (1, 3, 4, 6, 8, 12)}
    assert sizes[12] == 2
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    for length, size in sizes.items():
        assert 24 % size == 0  # the sequences of a step on this rank
        assert kept(size, length) <= kept(2, 12)
        larger = min((times * 2 for times in (1, 2, 3, 4, 6, 12) if times * 2 > size), default=None)
        assert larger is None or kept(larger, length) > kept(2, 12)
    assert sizes[6] == 2  # the head's logits do not shrink with the path, so twice as many do not quite fit
    assert largest_micro_batch(setting_of(layout, 0), 6) == 4
