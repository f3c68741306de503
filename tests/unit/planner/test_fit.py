"""A run that comes back on fewer GPUs: the first sizes that fit into their memory, by the plan."""

import math
from pathlib import Path

import pytest

from raptr_ds.config.load import load_run_config
from raptr_ds.planner.fit import fit
from raptr_ds.planner.shortage import MemoryNeed
from raptr_ds.runtime.planner_process import ask_planner

RUN_FILE = Path(__file__).parents[3] / "deepspeed_configs" / "ul2_1b_raptr.json"
PIPELINE = "raptr_ds.parallel.pipeline_model_parallel_size"


def run(*overrides: str, processes: int = 8):
    sizes = ["raptr_ds.model.vocab_size=32000", "train_batch_size=256", "train_micro_batch_size_per_gpu=8"]
    return load_run_config(RUN_FILE, [*sizes, *overrides], processes)


def needed(config) -> int:
    return math.ceil(MemoryNeed.fullest(config).memory.total)


def test_what_fits_stays():
    config = run()
    found = fit(config, needed(config) + 1)
    assert (found.zero_stage, found.micro_batch, found.is_enough) == (config.zero_stage, 8, True)


@pytest.mark.parametrize("overrides", [[], [f"{PIPELINE}=2"], ["zero_optimization.stage=0"]])
def test_the_first_that_fits_is_the_cheapest_of_all_that_do(overrides):
    """Against every stage and micro batch, each loaded from a run file of its own."""
    config = run(*overrides)
    stages = range(config.zero_stage, 2 if overrides == [f"{PIPELINE}=2"] else 4)
    by_cost = [(is_dear, -micro, stage) for stage in stages for micro in (8, 4, 2, 1) for is_dear in [stage == 3]]
    plans = {}
    for _, less, stage in sorted(by_cost):
        tried = run(*overrides, f"zero_optimization.stage={stage}", f"train_micro_batch_size_per_gpu={-less}")
        plans[stage, -less] = needed(tried)
    for memory in sorted(plans.values()):
        found = fit(config, memory)
        first = next(sizes for sizes, need in plans.items() if need <= memory)
        assert (found.zero_stage, found.micro_batch) == first
        assert (found.is_enough, math.ceil(found.needed)) == (True, plans[first])
    least = fit(config, min(plans.values()) - 1)
    assert (least.is_enough, math.ceil(least.needed)) == (False, min(plans.values()))


def test_one_rank_has_nobody_to_share_with():
    found = fit(run(processes=1), 1)
    assert (found.zero_stage, found.micro_batch, found.is_enough) == (run().zero_stage, 1, False)


def test_sizes_of_phases_stay():
    config = run("raptr_ds.path.schedule=12-24", "raptr_ds.parallel.micro_batches=[16,8]")
    found = fit(config, needed(config) - 1)
    assert found.micro_batch == 8
    assert found.zero_stage > config.zero_stage


def test_the_changed_run_is_the_one_that_its_file_would_give():
    changed = run().with_memory_sizes(2, 4)
    loaded = run("zero_optimization.stage=2", "train_micro_batch_size_per_gpu=4")
    assert changed == loaded
    assert changed.resolved() == loaded.resolved()
    assert changed.derived == loaded.derived


def test_the_trainer_asks_in_a_process_of_its_own():
    config = run()
    printed = ask_planner("raptr_ds.planner.fit", ["--processes", "8", "--memory", str(needed(config) - 1)], config)
    found = fit(config, needed(config) - 1)
    assert f'"zero_stage": {found.zero_stage}, "micro_batch": {found.micro_batch}' in printed
