"""ZeRO 0's optimizer: one call for all layers that move, and on a GPU a step that decides itself whether it is finite.

torch's fused Adam takes `found_inf` and `grad_scale` on a CPU too, so that what GPUs do is checked here.
"""

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from raptr_ds.engine import gradient_norm
from raptr_ds.parallel.groups import initialize_process_groups
from raptr_ds.parallel.launch import Launch
from raptr_ds.paths import LayerPath
from tests.dist.test_non_finite import differing, state_of
from tests.dist.trajectory import Case, Outcome, batch_at, build_engine, full_weights, path_method
from tests.dist.workers import run_distributed


class _Calls(TorchDispatchMode):
    """Counts the operations of torch by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[function._schema.name.removeprefix("aten::")] += 1
        return function(*args, **(kwargs or {}))


def train(
    launch: Launch, case: Case, decides_on_device: bool, bad_step: int = -1
) -> tuple[Outcome, bool, dict[str, int]]:
    """Train the case; return its outcome, whether `bad_step` left everything as it was, and the last step's calls."""
    groups = initialize_process_groups(launch, 1, 1)
    engine: Any = build_engine(case, groups)
    engine.engine.optimizer.decides_on_device = decides_on_device
    method, results, is_untouched, calls = path_method(case), [], True, _Calls()
    original = engine.engine.optimizer.step

    def counted() -> None:
        calls.counts.clear()
        with calls:
            original()

    engine.engine.optimizer.step = counted
    for step in range(case.steps):
        before = state_of(engine), engine.step_counts()
        if step == bad_step:
            engine.stage.register_forward_hook(_spoil)
        results.append(engine.train_step(batch_at(case, groups, step), method.path_at(step), step, case.learning_rate))
        if step == bad_step:
            engine.stage._forward_hooks.clear()
            is_untouched = not differing(before[0], state_of(engine)) and before[1] == engine.step_counts()
    outcome = Outcome(
        losses=[result.loss for result in results],
        grad_norms=[result.grad_norm for result in results],
        eval_loss=engine.evaluate([batch_at(case, groups, 1000)], LayerPath.full(case.num_layers)),
        weights=full_weights(engine, groups),
        skipped=[result.skipped for result in results],
    )
    return outcome, is_untouched, dict(calls.counts)


def _spoil(_module: Any, _inputs: Any, losses: torch.Tensor) -> torch.Tensor:
    return losses * float("nan")


FP32 = Case(micro_batch=4)  # three a step: the first, one between, the last
CASES = {
    "fp32": FP32,
    "fp32 zero_grad": replace(FP32, skipped_update="zero_grad"),
    "fp32 without clipping": replace(FP32, max_norm=0.0),
    "bf16": replace(FP32, precision="bf16"),
    "bf16, fp32 accumulated": replace(FP32, precision="bf16", accumulate_in_fp32=True),
    "width": replace(FP32, method="width", schedule="1-3-4", num_layers=3),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_that_decides_itself_follows_one_that_asks_the_host(name: str) -> None:
    """They round differently: the kernel divides where the host multiplies; in bf16 a weight may round differently."""
    case = CASES[name]
    loss = 1e-3 if case.precision == "bf16" else 1e-6
    (asked, _, _), (itself, is_untouched, _) = (
        run_distributed(train, 1, case, decides_on_device, 4)[0] for decides_on_device in (False, True)
    )
    assert itself.skipped == asked.skipped == [step == 4 for step in range(case.steps)]
    assert is_untouched
    finite = [step for step in range(case.steps) if step != 4]
    assert [itself.losses[s] for s in finite] == pytest.approx([asked.losses[s] for s in finite], rel=loss)
    assert [itself.grad_norms[s] for s in finite] == pytest.approx([asked.grad_norms[s] for s in finite], rel=20 * loss)
    assert itself.eval_loss == pytest.approx(asked.eval_loss, rel=loss)


def test_the_loss_scale_is_found_as_when_the_host_is_asked() -> None:
    case = replace(FP32, precision="fp16", fp16_scale_power=30, steps=20)
    asked, itself = (run_distributed(train, 1, case, decides)[0][0] for decides in (False, True))
    assert itself.skipped == asked.skipped
    assert any(itself.skipped)
    assert not all(itself.skipped)
    finite = [step for step, skipped in enumerate(asked.skipped) if not skipped]
    assert [itself.losses[s] for s in finite] == pytest.approx([asked.losses[s] for s in finite], rel=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_nothing_of_a_warm_step_is_looked_at_on_the_host_but_its_result(name: str) -> None:
    """What a CPU looks at is what a GPU would be waited for; the GPU itself is tests/gpu/test_no_waiting.py's."""
    assert run_distributed(looks_of_a_step, 1, CASES[name], True)[0] == 0
    assert run_distributed(looks_of_a_step, 1, CASES[name], False)[0] == 1, "the norm"


def train_with_a_gpus_norm(launch: Launch, case: Case, decides_on_device: bool) -> Any:
    """Train with the norms of all tensors taken at once."""
    gradient_norm._norms = gradient_norm._norms_at_once
    return train(launch, case, decides_on_device)


def looks_of_a_step(launch: Launch, case: Case, decides_on_device: bool) -> int:
    """Return how often the last step of the case makes a Python number of a tensor, besides the read-back."""
    groups = initialize_process_groups(launch, 1, 1)
    engine: Any = build_engine(case, groups)
    engine.engine.optimizer.decides_on_device = decides_on_device
    calls = _Calls()
    for step in range(case.steps):
        with calls if step == case.steps - 1 else nullcontext():
            engine.train_step(batch_at(case, groups, step), path_method(case).path_at(step), step, case.learning_rate)
    assert calls.counts["mm"] or calls.counts["addmm"], "nothing was counted"
    return calls.counts["_local_scalar_dense"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_calls_of_a_step_do_not_grow_with_the_layers(precision: str) -> None:
    """Norm, scaling, AdamW and working weights: one call each for all that moves, two where weight decay differs.

    With the norm as GPUs take it; a CPU, which no launch of a kernel delays, takes norms of rows.
    """
    cases = [Case(precision=precision, num_layers=n, schedule=f"{n}", steps=2) for n in (2, 8)]
    short, long = (run_distributed(train_with_a_gpus_norm, 1, case, False)[0][2] for case in cases)
    for calls in (short, long):
        assert calls["_fused_adamw_"] == 2
        assert calls["_foreach_norm"] == 1
        assert calls["_foreach_mul_"] == 1
        assert calls.get("_foreach_copy_", 0) == (2 if precision == "bf16" else 0)
    growing = {name for name in long if long[name] > short.get(name, 0)}
    assert growing <= {"empty_like", "detach"}, {name: (short.get(name, 0), long[name]) for name in growing}


def test_layers_of_different_step_counts_move_in_one_call_as_by_themselves() -> None:
    """Merged groups give the bits that a call for each group gives."""
    case = replace(CASES["fp32"], steps=6)
    merged = run_distributed(train, 1, case, False)[0][0]
    apart = run_distributed(train_unmerged, 1, case)[0][0]
    assert merged.losses == apart.losses
    assert all((merged.weights[name] == apart.weights[name]).all() for name in apart.weights)


def train_unmerged(launch: Launch, case: Case) -> tuple[Outcome, bool, dict[str, int]]:
    """Train with a call for each group of the optimizer."""
    from raptr_ds.engine import replicated

    replicated._merged = lambda groups: groups
    outcome, is_untouched, calls = train(launch, case, False)
    assert calls["_fused_adamw_"] > 2
    return outcome, is_untouched, calls
