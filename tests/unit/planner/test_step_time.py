"""The cost model of a step: closed forms on simple layouts, and what each part follows."""

from dataclasses import replace

import numpy as np
import pytest

from raptr_ds.paths import LayerPath
from raptr_ds.paths.cost import layer_parameters, num_parameters, step_flops
from raptr_ds.paths.path import Parts
from raptr_ds.planner.step_time import Device, Layout, Setting, active_in_stages, activity_table, step_seconds
from tests.model_shapes import model_shape

SHAPE = model_shape("ul2", layers=8, hidden=64, heads=4, length=32, vocabulary=1000, ffn=192)
PATHS = [LayerPath.full(8), LayerPath((0, 1, 4, 7), 8), LayerPath((0, 7), 8)]
NO_LINKS = Device(1e12, np.inf, np.inf, np.inf, latency_seconds=0.0)


@pytest.mark.parametrize("recompute", [False, True])
def test_one_device_takes_its_executed_flops(recompute):
    layout = Layout((8,), micro_batch=4, num_micro_batches=3, recompute=recompute)
    times = step_seconds(PATHS, Setting(SHAPE, layout, NO_LINKS, 10))
    for path, seconds in zip(PATHS, times.total, strict=True):
        expected = step_flops(SHAPE, path.length, 12, 120, recompute) / 1e12
        # A recomputed layer is forward again: four passes, as FLOPs count them.
        assert seconds == pytest.approx(expected, rel=1e-12)


def test_tensor_ranks_share_the_flops():
    one, four = (Layout((8,), 4, 3, tensor=tensor) for tensor in (1, 4))
    times = [step_seconds(PATHS, Setting(SHAPE, layout, NO_LINKS, 10)).total for layout in (one, four)]
    assert times[0] == pytest.approx(4 * times[1])


@pytest.mark.parametrize(("architecture", "of_norms"), [("bert", 4), ("ul2", 2)])
def test_collectives_over_tensor_ranks_are_those_of_the_table(architecture, of_norms):
    """docs/scaling.md: rings of the stream, a rank's share of which a pipeline's stages hand on; and messages."""
    shape = model_shape(architecture, layers=8, hidden=64, heads=4, length=32, vocabulary=1000, ffn=192)
    seconds = {}
    for bytes_per_second, latency in ((1e9, 0.0), (np.inf, 1e-3)):
        links = Device(np.inf, np.inf, bytes_per_second, bytes_per_second, latency_seconds=latency)
        for sequence_parallel in (False, True):
            layout = Layout((8,), 4, 3, tensor=4, sequence_parallel=sequence_parallel)
            times = step_seconds(PATHS, Setting(shape, layout, links, 10)).total
            seconds[latency, sequence_parallel] = times / (3 * np.array([path.length for path in PATHS]))
    ring = 3 / 4 * 4 * 32 * 64 * 2 / 1e9
    np.testing.assert_allclose(seconds[0.0, False], 8 * ring)
    np.testing.assert_allclose(seconds[0.0, True], 10 * ring)
    np.testing.assert_allclose(seconds[1e-3, False], 4e-3)
    np.testing.assert_allclose(seconds[1e-3, True], (10 + of_norms) * 1e-3)


def test_a_balanced_path_saves_its_share_on_a_pipeline_and_a_full_stage_none_of_it():
    shape = SHAPE.model_copy(update={"vocab_size": 1})
    layout = Layout((2, 2, 2, 2), 1, 32)
    paths = [LayerPath.full(8), LayerPath((0, 2, 4, 6), 8), LayerPath((0, 1, 2, 4), 8)]
    full, balanced, uneven = step_seconds(paths, Setting(shape, layout, NO_LINKS, 0)).pipeline
    assert full / balanced == pytest.approx(2.0)
    assert 1.0 < full / uneven < 1.1


def test_communication_follows_bytes_and_active_layers():
    links = Device(np.inf, 1e9, np.inf, 1e9, ranks_per_machine=2, latency_seconds=0.0)
    # An all-reduce sends twice what a reduce-scatter does; three micro batches. Which one DeepSpeed makes is counted
    # in tests/dist/test_proportional.py.
    for stage, reductions, gathers in ((0, 2, 0), (1, 2, 1), (2, 6, 1), (3, 3, 3)):
        layout = Layout((8,), 4, 3, data=4, zero_stage=stage)
        times = step_seconds(PATHS, Setting(SHAPE, layout, links, 10))
        for path, reduced, gathered, stepped in zip(
            PATHS, times.gradients, times.gathers, times.optimizer, strict=True
        ):
            touched = num_parameters(SHAPE) - (8 - path.length) * layer_parameters(SHAPE)
            assert reduced == pytest.approx(reductions * touched * 2 * 3 / 4 / 1e9)
            assert gathered == pytest.approx(gathers * touched * 2 * 3 / 4 / 1e9)
            assert stepped == pytest.approx(touched / (4 if stage else 1) * 30 / 1e9)


@pytest.mark.parametrize(("kept", "again"), [(0, 8), (3, 5), (8, 0), (100, 0)])
def test_zero_3_gathers_layers_again_that_it_has_not_kept_whole(kept, again):
    links = Device(np.inf, np.inf, np.inf, 1e9, ranks_per_machine=1, latency_seconds=0.0)
    layout = Layout((8,), 4, 3, data=4, zero_stage=3, kept_whole=kept * layer_parameters(SHAPE))
    gathered = num_parameters(SHAPE) + again * layer_parameters(SHAPE)
    times = step_seconds([LayerPath.full(8)], Setting(SHAPE, layout, links, 10))
    assert times.gathers == pytest.approx(3 * gathered * 2 * 3 / 4 / 1e9)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_several_paths_compute_in_turns_and_train_all_their_layers(stage):
    links = Device(1e12, 1e9, np.inf, 1e9, ranks_per_machine=1, latency_seconds=0.0)
    layout = Layout((8,), 4, 4, data=4, zero_stage=stage)
    draws = [LayerPath((0, 1, 4, 7), 8), LayerPath((0, 1, 2, 3), 8)]
    both = step_seconds([LayerPath.of_shares(draws)], Setting(SHAPE, layout, links, 10))
    alone = step_seconds(draws, Setting(SHAPE, layout, links, 10))
    union = step_seconds([LayerPath((0, 1, 2, 3, 4, 7), 8)], Setting(SHAPE, layout, links, 10))
    assert both.pipeline == pytest.approx(alone.pipeline.mean())
    assert both.optimizer == pytest.approx(union.optimizer)
    assert both.gradients == pytest.approx(union.gradients if stage < 2 else alone.gradients[:1])
    assert both.gathers == pytest.approx(union.gathers if stage < 3 else alone.gathers[:1])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_layers_in_part_compute_less_and_are_reduced_and_stepped_whole(stage):
    """docs/methods.md: width saves computation, not communication."""
    chosen = tuple((0,) if layer in PATHS[1].layers else () for layer in range(8))
    whole, part = PATHS[1], replace(PATHS[1], parts=Parts(4, chosen, chosen))
    links = Device(1e12, 1e9, 1e9, 1e9, latency_seconds=1e-3)
    layout = Layout((3, 5), 4, 3, data=4, zero_stage=stage)
    ours, theirs = (step_seconds([path], Setting(SHAPE, layout, links, 10)) for path in (part, whole))
    for name in ("gradients", "gathers", "copies", "optimizer"):
        assert getattr(ours, name) == getattr(theirs, name), name
    alone = Setting(SHAPE, Layout((8,), 4, 3, zero_stage=0), NO_LINKS, 10)
    assert step_seconds([part], alone).total == pytest.approx(step_flops(SHAPE, part.work, 12, 120) / 1e12)
    assert part.work == 1
    # Reductions over tensor ranks are of the whole stream.
    tensor = Setting(SHAPE, Layout((8,), 4, 3, tensor=4), replace(links, flops_per_second=np.inf), 10)
    assert step_seconds([part], tensor).pipeline == step_seconds([whole], tensor).pipeline


@pytest.mark.parametrize("is_narrow", [False, True])
def test_a_stage_recomputes_where_it_has_more_layers_than_it_keeps(is_narrow):
    layout = Layout((4, 4), 4, 1, recompute=True)
    path = LayerPath((0, 1, 2, 7), 8)
    if is_narrow:  # layers count, not their work
        chosen = tuple((0,) if layer in path.layers else () for layer in range(8))
        path = replace(path, parts=Parts(2, chosen, chosen))
    by_keeping = []
    for kept in (0, 1, 2, 3):
        setting = Setting(SHAPE, layout, NO_LINKS, 10, keep_up_to=kept)
        by_keeping.append(step_seconds([path], setting).pipeline[0])
        # One micro batch goes through the stages one after the other: what all of them do adds up.
        assert by_keeping[-1] == pytest.approx(setting.steps.flops(path, 40) / 1e12)
    first, second, third, last = by_keeping
    assert first > second == third > last


def test_layers_are_counted_by_stage():
    table = activity_table(PATHS)
    assert active_in_stages(table, (3, 5)).tolist() == [[3, 5], [2, 2], [1, 1]]
    assert Layout((2,) * 4, 1, 8, tensor=2, data=3).num_ranks == 24
