"""What a training step waits for: numbers that the host reads from the device, and other ranks.

On a GPU each number that is read makes the host wait. Steps are warm, and the read-back at their end (engine/zero.py)
is not counted. tests/gpu/test_no_waiting.py raises where a GPU is waited for.
"""

import time
from typing import Any

import pytest
import torch

from raptr_ds.engine import zero
from raptr_ds.parallel.launch import Launch
from raptr_ds.paths import LayerPath
from tests.dist.counting import counting
from tests.dist.trajectory import Case, batch_at, build_engine, process_groups
from tests.dist.workers import run_distributed


def reads_in_steps(launch: Launch, case: Case) -> list[int]:
    """Return how many numbers each of two warm steps reads but for its result, on paths of 5 and of 3 layers."""
    groups = process_groups(launch, case)
    engine: Any = build_engine(case, groups)
    zero.read_back = lambda values: [0.0] * values.numel()
    engine.train_step(batch_at(case, groups, 0), LayerPath.full(5), 0, 1e-3)
    found = []
    for step, path in enumerate((LayerPath.full(5), LayerPath((0, 2, 4), 5)), start=1):
        with counting(engine.optimizer) as counter:
            engine.train_step(batch_at(case, groups, step), path, step, 1e-3)
        found.append(counter.reads)
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_1_to_3_read_the_norm_only_before_their_step(stage: int, precision: str) -> None:
    """Not once more for each parameter group, of which there are two a layer."""
    case = Case(zero=stage, precision=precision, accumulate_in_fp32=precision != "fp32")
    assert run_distributed(reads_in_steps, 2, case) == [[1, 1]] * 2


def own_seconds_and_waits(launch: Launch, case: Case, wait: float) -> tuple[float, int]:
    """Return a warm step's own seconds where the last reduction takes `wait` longer, and how often that was."""
    groups = process_groups(launch, case)
    engine: Any = build_engine(case, groups)
    path, waits = LayerPath.full(5), []
    engine.train_step(batch_at(case, groups, 0), path, 0, 1e-3)
    done = engine.optimizer._clear_previous_reduced_grads  # DeepSpeed calls it when it has waited for the device

    def late() -> None:
        time.sleep(wait)
        waits.append(wait)
        done()

    engine.optimizer._clear_previous_reduced_grads = late
    return engine.train_step(batch_at(case, groups, 1), path, 1, 1e-3).own_seconds, len(waits)


@pytest.mark.parametrize("stage", [1, 2])
def test_waiting_for_an_overlapped_reduction_is_no_own_work(stage: int) -> None:
    case = Case(zero=stage, overlap=True, micro_batch=6)
    for seconds, waits in run_distributed(own_seconds_and_waits, 2, case, 1.0):
        assert waits > 0
        assert seconds < 1.0


def kept_times_and_sent_types(launch: Launch, case: Case) -> tuple[int, set[torch.dtype]]:
    """Train three steps; return how many times DeepSpeed keeps, and the types of what a warm one sends to stages."""
    from deepspeed.runtime.pipe import p2p

    groups = process_groups(launch, case)
    engine: Any = build_engine(case, groups)
    send, sent = p2p.send, set()

    def observed(tensor: torch.Tensor, to: int, *more: Any) -> Any:
        sent.add(tensor.dtype)
        return send(tensor, to, *more)

    for step in range(3):
        if step == 1:
            p2p.send = observed
        engine.train_step(batch_at(case, groups, step), LayerPath.full(5), step, 1e-3)
    timers = engine.engine.timers.get_timers().values()
    return sum(len(timer.event_timers) for timer in timers), sent


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_pipeline_keeps_no_events_and_sends_no_sizes(tensor: int) -> None:
    """Two events of each batch would add up on a GPU; the sizes of parts of the stream would be read from it."""
    case = Case(pipeline=2, tensor=tensor, micro_batch=4)
    assert run_distributed(kept_times_and_sent_types, 2 * tensor, case) == [(0, {torch.float32})] * (2 * tensor)
