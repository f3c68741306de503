"""The peak of a run's memory: over all phases, with each one's micro batch, and over all paths that can be drawn."""

from pathlib import Path

import pytest

from raptr_ds.config.load import load_run_config
from raptr_ds.paths.balance import BalancedStages
from raptr_ds.paths.stages import stage_layers
from raptr_ds.planner.memory import rank_memory
from raptr_ds.planner.peak import active_range, phase_peak
from raptr_ds.planner.plan import plan_run
from raptr_ds.planner.setting import setting_of
from raptr_ds.planner.shortage import MemoryNeed, shortage
from raptr_ds.planner.step_time import Device, Layout, Setting
from raptr_ds.runtime.method import path_method_of
from raptr_ds.runtime.out_of_memory import DeviceMemory
from tests.model_shapes import model_shape
from tests.path_methods import path_method

RUN_FILES = Path(__file__).parents[3] / "deepspeed_configs"
SHAPE = model_shape("bert", layers=6, hidden=64, heads=4, length=32, vocabulary=500, ffn=256)
RECOMPUTED = ("raptr_ds.parallel.activation_checkpointing=true", "raptr_ds.parallel.keep_activations_up_to=9")


@pytest.mark.parametrize("stages", [(6,), (3, 3), (2, 4), (2, 2, 2)])
@pytest.mark.parametrize(
    "keys",
    [
        {"method": "full"},
        {"method": "raptr", "schedule": "3-4-6"},
        {"method": "raptr", "schedule": "2-6"},
        {"method": "raptr", "schedule": "3-6", "fixed_layers": (0, 1, 2)},
        {"method": "raptr", "schedule": "4-6", "sampling": "bernoulli"},
        {"method": "raptr", "schedule": "3-5-6", "sampling": "balanced"},
        {"method": "raptr", "schedule": "3-6", "width_schedule": "2-4", "num_heads": 4, "skipped_update": "zero_grad"},
        {"method": "raptr", "schedule": "3-6", "paths_per_step": 2},
        {"method": "pld", "pld_theta": 0.3, "pld_gamma": 0.1},
        {"method": "layerdrop", "layerdrop": 0.4},
        {"method": "stacking", "schedule": "2-4-6", "growth_position": "middle"},
    ],
)
def test_paths_have_on_each_stage_from_the_fewest_to_the_most_layers(keys, stages):
    """Both ends are reached, in 4,000 steps: a path at an end has a probability above 1/400 in all of these."""
    balanced = BalancedStages((3, 3)) if keys.get("sampling") == "balanced" else None
    method = path_method(num_layers=6, num_steps=4000, seed=1, stages=balanced, **keys)
    for phase in method.phases:
        paths = [draw for step in range(phase.first_step, phase.end_step) for draw in method.path_at(step).draws]
        for layers in stage_layers(stages):
            seen = [len(path.active_in(layers)) for path in paths]
            fewest = 0 if keys["method"] == "layerdrop" else min(seen)  # of all six, it draws none again
            assert active_range(method, phase, layers) == (fewest, max(seen))


def test_of_several_paths_in_a_step_gradients_are_those_of_all():
    setting = Setting(SHAPE, Layout((6,), 2, 8, zero_stage=0), Device(is_gpu=False), 5.0)
    for draws, trained in ((1, 2), (2, 4), (4, 6)):
        method = path_method("raptr", num_layers=6, num_steps=40, schedule="2-6", paths_per_step=draws)
        peak = phase_peak(method, method.phases[0], setting)
        assert peak.memory.gradients == rank_memory(setting, 0, trained).gradients
        assert peak.memory.activations == rank_memory(setting, 0, 2).activations


def loaded(name, *overrides, processes=1):
    return load_run_config(RUN_FILES / f"{name}.json", overrides, processes).with_vocab_size(32_000)


@pytest.mark.parametrize(
    ("name", "processes", "overrides", "peak"),
    [
        ("bert_base_raptr", 1, ["raptr_ds.parallel.micro_batches=[128,128,64,32]"], (128, 8, False)),
        ("bert_base_raptr", 1, RECOMPUTED, (32, 8, False)),  # phases of 10 and 12 layers recompute
        ("ul2_1b_raptr", 1, ['raptr_ds.path={"method": "layerdrop"}'], (8, 24, False)),
        ("ul2_1b_raptr", 2, ["raptr_ds.parallel.pipeline_model_parallel_size=2"], (8, 12, False)),
    ],
)
def test_the_warning_and_the_table_are_of_the_fullest_moment(name, processes, overrides, peak):
    config = loaded(name, *overrides, processes=processes)
    table = plan_run(path_method_of(config), setting_of(config, Device())).peak_bytes
    need = MemoryNeed.fullest(config)
    layout = need.peak.setting.layout
    assert (layout.micro_batch, need.peak.num_active, layout.recompute) == peak
    assert need.memory.total == table
    assert shortage(config, DeviceMemory("A GPU", int(table) + 1)) == []
    assert f"{table / 2**30:.2f} GiB" in shortage(config, DeviceMemory("A GPU", int(table) - 1))[0]


@pytest.mark.parametrize(
    ("given", "remedy", "changed"),
    [
        (RECOMPUTED, "keep_activations_up_to=0 (", [RECOMPUTED[0]]),
        (
            ["raptr_ds.parallel.micro_batches=[128,128,64,32]"],
            "raptr_ds.parallel.micro_batches=[64, 64, 32, 16]:",
            ["raptr_ds.parallel.micro_batches=[64,64,32,16]"],
        ),
    ],
)
def test_what_would_help_there_is_what_sets_the_peak(given, remedy, changed):
    need, after = (MemoryNeed.fullest(loaded("bert_base_raptr", *overrides)) for overrides in (given, changed))
    (line,) = [line for line in need.remedies() if remedy in line]
    assert line.endswith(f" {(need.memory.total - after.memory.total) / 2**30:.2f} GiB less")
    assert not any("train_micro_batch_size_per_gpu" in line for line in need.remedies()) or given == RECOMPUTED
