"""bf16 and fp16: close to fp32 in every layout, and never moved by numbers that are not finite."""

from dataclasses import replace

import numpy as np
import pytest

from raptr_ds.parallel.launch import Launch
from tests.dist.test_layouts import RUNS, SIX, reference
from tests.dist.trajectory import Case, batch_at, build_engine, full_weights, path_method, process_groups, run_case
from tests.dist.workers import run_distributed

# bf16 keeps 8 bits: each stored activation is off by up to 0.4%, which averages to about 1e-3 in a loss over tens of
# positions. The band is twice what the layouts were seen to differ from fp32; a lost gradient is ten times as much.
BAND = {"bf16": 4e-3, "fp16": 1e-3}

LAYOUTS = {
    "DP2": (2, {}),
    "DP2, fp32 accumulation": (2, {"accumulate_in_fp32": True, "micro_batch": 1}),
    "DP2 ZeRO 1": (2, {"zero": 1}),
    "DP2 ZeRO 1, fp32 accumulation": (2, {"zero": 1, "accumulate_in_fp32": True, "micro_batch": 1}),
    "DP2 ZeRO 2": (2, {"zero": 2}),
    "DP2 ZeRO 3": (2, {"zero": 3}),
    "TP2": (2, {"tensor": 2, "micro_batch": 4}),
    "TP2 SP": (2, {"tensor": 2, "sequence_parallel": True, "micro_batch": 4}),
    "TP2 SP DP2 ZeRO 1, fp32 accumulation": (
        4,
        {"tensor": 2, "sequence_parallel": True, "zero": 1, "accumulate_in_fp32": True},
    ),
    "PP2": (2, {"pipeline": 2}),
    "PP2, fp32 accumulation": (2, {"pipeline": 2, "accumulate_in_fp32": True}),
    "PP2 DP2 ZeRO 1": (4, {"pipeline": 2, "zero": 1}),
    "PP2 DP2 ZeRO 1, fp32 accumulation": (4, {"pipeline": 2, "zero": 1, "accumulate_in_fp32": True}),
}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision_stays_in_its_band(precision: str, layout: str) -> None:
    world_size, changes = LAYOUTS[layout]
    case = replace(SIX, precision=precision, **changes)
    expected = reference(SIX)
    found = run_distributed(run_case, world_size, case)[0]
    assert not any(found.skipped)
    assert found.losses == pytest.approx(expected.losses, rel=BAND[precision])
    assert found.grad_norms == pytest.approx(expected.grad_norms, rel=20 * BAND[precision])


@pytest.mark.parametrize(
    ("run", "precision", "world_size", "changes"),
    [
        ("bert-stacking", "bf16", 2, {"zero": 2}),
        ("bert-stacking", "fp16", 2, {"zero": 3}),
        ("bert-stacking", "bf16", 4, {"pipeline": 2, "zero": 1, "accumulate_in_fp32": True}),
        ("bert-width", "fp16", 2, {"tensor": 2}),
        ("bert-width", "bf16", 2, {"accumulate_in_fp32": True}),
        ("ul2-width-zero_grad", "bf16", 2, {"zero": 3}),
        ("ul2-width-zero_grad", "bf16", 4, {"pipeline": 2, "zero": 1}),
    ],
)
def test_growth_and_widths_stay_in_their_band(
    run: str, precision: str, world_size: int, changes: dict[str, int]
) -> None:
    """Layers are copied in fp32, and idle parts kept there, whatever the working weights are."""
    expected = reference(RUNS[run])
    found = run_distributed(run_case, world_size, replace(RUNS[run], precision=precision, **changes))[0]
    assert not any(found.skipped)
    assert found.losses == pytest.approx(expected.losses, rel=BAND[precision])
    assert found.grad_norms == pytest.approx(expected.grad_norms, rel=20 * BAND[precision])


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (2, {}),
        (2, {"zero": 1}),
        (2, {"zero": 2}),
        (4, {"pipeline": 2, "zero": 1}),
    ],
)
def test_three_paths_a_step_are_accumulated_in_fp32(world_size: int, changes: dict[str, int]) -> None:
    """A layer that only some micro batches have taken has a gradient beside the working weights all the same."""
    alone = RUNS["bert-3-paths"]
    expected = reference(alone)
    case = replace(alone, precision="bf16", accumulate_in_fp32=True, **changes)
    found = run_distributed(run_case, world_size, case)[0]
    assert found.losses == pytest.approx(expected.losses, rel=BAND["bf16"])
    assert found.grad_norms == pytest.approx(expected.grad_norms, rel=20 * BAND["bf16"])


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (2, {}),
        (2, {"zero": 1}),
        (2, {"zero": 2}),
        (2, {"zero": 3}),
        (2, {"pipeline": 2}),
        (4, {"pipeline": 2, "zero": 1}),
    ],
)
def test_fp16_overflow_skips_the_step_and_lowers_the_scale(world_size: int, changes: dict[str, int]) -> None:
    """A loss scale of 2^22 overflows fp16 gradients: all ranks skip steps until the scale fits."""
    case = replace(Case(), precision="fp16", fp16_scale_power=22, steps=12, schedule="5", **changes)
    outcomes = run_distributed(run_case, world_size, case)
    assert all(outcome.skipped == outcomes[0].skipped for outcome in outcomes)
    skipped = outcomes[0].skipped
    first_good = skipped.index(False)
    assert 3 < first_good < 8
    assert not any(skipped[-4:])  # near the limit another batch may overflow once more, but the scale settles
    assert sum(skipped[first_good:]) <= 3
    assert outcomes[0].losses[-1] < outcomes[0].losses[first_good]


def norms_and_first_moments(launch: Launch, case: Case) -> tuple[list[float], dict[str, np.ndarray]]:
    """Train the case; return its gradient norms, and on rank 0 the optimizer's mean gradients."""
    groups = process_groups(launch, case)
    engine = build_engine(case, groups)
    path = path_method(case).path_at(0)
    steps = range(case.steps)
    norms = [engine.train_step(batch_at(case, groups, step), path, step, 1e-3).grad_norm for step in steps]
    return norms, full_weights(engine, groups, "exp_avg")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_are_unscaled_by_the_scale_of_their_own_step(stage: int) -> None:
    """The loss scale doubles after each step but the first; DeepSpeed halves the gradients of the step before."""
    case = Case(precision="fp16", fp16_scale_window=1, schedule="5", steps=4, max_norm=0.0)
    expected_norms, expected_means = run_distributed(norms_and_first_moments, 2, case)[0]
    norms, means = run_distributed(norms_and_first_moments, 2, replace(case, zero=stage))[0]
    assert norms == pytest.approx(expected_norms, rel=20 * BAND["fp16"])
    for name, mean in means.items():
        assert np.linalg.norm(mean) == pytest.approx(np.linalg.norm(expected_means[name]), rel=0.1, abs=1e-6), name
