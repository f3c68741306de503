"""Path-proportional ZeRO: what a step sends between ranks, and what its optimizer computes, follows the path.

Bytes and elements are counted, not timed. What does not belong to layers (embedding, head, norm) is taken from a step of
the empty path; the rest is the layers' share, of which half a path must cost half, within 5%.
"""

from dataclasses import dataclass, replace
from typing import Any

import pytest

from raptr_ds.parallel.groups import initialize_process_groups
from raptr_ds.parallel.launch import Launch
from raptr_ds.paths import Path
from tests.dist.counting import counting
from tests.dist.trajectory import Case, batch_at, build_engine
from tests.dist.workers import run_distributed

NUM_LAYERS = 8
PATHS = {"empty": (), "half": (0, 3, 4, 7), "other half": (0, 2, 5, 7), "full": tuple(range(NUM_LAYERS))}


@dataclass(frozen=True)
class StepCount:
    """One step's bytes in collectives, and elements in the optimizer's step, on one rank."""

    sent_bytes: int
    elements: int


def count_steps(launch: Launch, case: Case) -> dict[str, StepCount]:
    """Count a step of each path, after one of the full path."""
    groups = initialize_process_groups(launch, case.tensor, case.pipeline)
    engine: Any = build_engine(case, groups)
    batch = batch_at(case, groups, 0)
    for number in range(2):
        engine.train_step(batch, Path(PATHS["full"], NUM_LAYERS), number, case.learning_rate)
    counts = {}
    for number, (name, layers) in enumerate(PATHS.items(), start=2):
        with counting(engine.engine.optimizer) as counter:
            engine.train_step(batch, Path(layers, NUM_LAYERS), number, case.learning_rate)
        counts[name] = StepCount(counter.sent_bytes, counter.elements)
    return counts


def share(counts: dict[str, StepCount], path: str, what: str) -> float:
    """Return a path's part of the layers' share."""
    empty, full = getattr(counts["empty"], what), getattr(counts["full"], what)
    assert full > 2 * empty, (empty, full)
    return (getattr(counts[path], what) - empty) / (full - empty)


LAYOUTS = {
    "DP2": (2, {}),
    "DP2 ZeRO 1": (2, {"zero": 1}),
    "DP2 ZeRO 2": (2, {"zero": 2}),
    "DP2 ZeRO 3": (2, {"zero": 3}),
    "DP2 ZeRO 1, bf16": (2, {"zero": 1, "precision": "bf16"}),
    "DP2 ZeRO 2, fp32 accumulation": (2, {"zero": 2, "precision": "bf16", "accumulate_in_fp32": True}),
    "TP2 DP2 ZeRO 1": (4, {"zero": 1, "tensor": 2}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_a_path_costs_half_of_the_layers_share(layout: str) -> None:
    world_size, changes = LAYOUTS[layout]
    case = replace(Case(num_layers=NUM_LAYERS, micro_batch=3), **changes)
    for counts in run_distributed(count_steps, world_size, case):
        for path in ("half", "other half"):
            for what in ("sent_bytes", "elements"):
                assert share(counts, path, what) == pytest.approx(0.5, rel=0.05), (path, what, counts)
