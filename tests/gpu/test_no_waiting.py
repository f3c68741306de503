"""On a GPU the host runs ahead: a warm training step, or an evaluation, waits for the device once, to read its result.

ZeRO 1 and 2 wait once more, for the norm before their step. torch.cuda.set_sync_debug_mode("error") raises wherever
torch waits for the device; explicit synchronizations, which it does not see, raise here too. The one read-back is
engine/zero.py, read_back.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from raptr_ds.parallel.groups import ProcessGroups, initialize_process_groups
from raptr_ds.parallel.launch import detect_launch, prepare_imports
from raptr_ds.paths import LayerPath
from tests.dist.trajectory import Case

if not torch.cuda.is_available():
    pytest.skip("needs a GPU: it measures when the host waits for one", allow_module_level=True)

CASES = {
    "bf16, accumulated in fp32": Case(precision="bf16", accumulate_in_fp32=True),
    "bf16": Case(precision="bf16"),
    "fp32": Case(),
    "fp16": Case(precision="fp16"),
    "zero_grad": Case(precision="bf16", skipped_update="zero_grad"),
    "width": Case(precision="bf16", method="width", schedule="1-3-4", num_layers=3),
    "several paths": Case(precision="bf16", paths_per_step=3, schedule="2-4-5"),
    "packed": Case(precision="bf16", packed=True),
}


@pytest.fixture(scope="module")
def groups() -> Iterator[ProcessGroups]:
    """The groups of this process alone, on its GPU."""
    prepare_imports(has_gpu=True)
    yield initialize_process_groups(detect_launch(), 1, 1)
    torch.distributed.destroy_process_group()


@contextmanager
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Raise where the host waits inside, but for read-backs; yield how many numbers each of these has read."""
    from raptr_ds.engine import zero

    reads: list[int] = []

    def read_back(values: torch.Tensor) -> list[float]:
        torch.cuda.set_sync_debug_mode("default")
        try:
            return values.tolist()
        finally:
            reads.append(values.numel())
            torch.cuda.set_sync_debug_mode("error")

    def refuse(*_args: Any) -> None:
        raise AssertionError("the host waits for the device")

    with monkeypatch.context() as patched:
        patched.setattr(zero, "read_back", read_back)
        patched.setattr(torch.cuda, "synchronize", refuse)
        patched.setattr(torch.cuda.Stream, "synchronize", refuse)
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield reads
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", CASES)
def test_a_warm_step_and_an_evaluation_wait_once(
    name: str, groups: ProcessGroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.dist.trajectory import batch_at, build_engine, path_method

    case = CASES[name]
    engine: Any = build_engine(case, groups)
    assert engine.engine.optimizer.decides_on_device
    method = path_method(case)
    batches = [batch_at(case, groups, step) for step in range(case.steps)]
    paths = [method.path_at(step) for step in range(case.steps)]
    for step in range(case.steps - 2):  # every phase but the last two steps of the last: states and kernels are there
        engine.train_step(batches[step], paths[step], step, case.learning_rate)
    engine.evaluate(batches[:1], LayerPath.full(case.num_layers))
    with no_waiting(monkeypatch) as reads:
        for step in range(case.steps - 2, case.steps):
            result = engine.train_step(batches[step], paths[step], step, case.learning_rate)
            assert not result.skipped
        assert reads == [3, 3]  # loss, predicted positions, norm
        engine.evaluate(batches[:3], LayerPath.full(case.num_layers))
        assert reads == [3, 3, 2]  # loss, predicted positions


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_1_and_2_wait_for_the_norm_besides(
    stage: int, groups: ProcessGroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.runtime.zero import stage_1_and_2

    from raptr_ds.engine import deepspeed_engine
    from tests.dist.trajectory import batch_at, build_engine, path_method

    is_invalid = stage_1_and_2.is_invalid_grad_norm
    checked: list[torch.Tensor] = []

    def check(norm: torch.Tensor) -> bool:
        checked.append(norm)
        torch.cuda.set_sync_debug_mode("default")
        try:
            return is_invalid(norm)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    # One process would run stage 0.
    monkeypatch.setattr(deepspeed_engine, "without_idle_zero", lambda config, _data_parallel: config)
    case = Case(precision="bf16", accumulate_in_fp32=True, zero=stage)
    engine: Any = build_engine(case, groups)
    path = path_method(case).path_at(0)
    batches = [batch_at(case, groups, step) for step in range(3)]
    engine.train_step(batches[0], path, 0, case.learning_rate)
    with no_waiting(monkeypatch) as reads, monkeypatch.context() as patched:
        patched.setattr(stage_1_and_2, "is_invalid_grad_norm", check)
        for step in (1, 2):
            assert not engine.train_step(batches[step], path, step, case.learning_rate).skipped
    assert reads == [3, 3]
    assert len(checked) == 2


def test_the_check_itself_sees_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """One number looked at, one copy from pageable memory, one synchronization: each is refused."""
    there = torch.ones((), device="cuda")
    for wait in (there.item, lambda: torch.tensor([1.0], device="cuda"), torch.cuda.current_stream().synchronize):
        with no_waiting(monkeypatch), pytest.raises((RuntimeError, AssertionError)):
            wait()


def test_a_step_that_is_not_finite_moves_nothing_on_the_device(groups: ProcessGroups) -> None:
    """Weights, moments and step counts stay bit for bit, though the host learns of it after the optimizer's step."""
    from tests.dist.test_non_finite import differing, state_of
    from tests.dist.trajectory import batch_at, build_engine, path_method

    case = CASES["bf16, accumulated in fp32"]
    engine: Any = build_engine(case, groups)
    path = path_method(case).path_at(0)
    engine.train_step(batch_at(case, groups, 0), path, 0, case.learning_rate)
    before, counts = state_of(engine), engine.step_counts()
    hook = engine.stage.register_forward_hook(lambda _module, _inputs, losses: losses * float("nan"))
    assert engine.train_step(batch_at(case, groups, 1), path, 1, case.learning_rate).skipped
    hook.remove()
    assert not differing(before, state_of(engine))
    assert counts == engine.step_counts()
    assert not engine.train_step(batch_at(case, groups, 2), path, 2, case.learning_rate).skipped
