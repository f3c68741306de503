"""Compiled layers in layouts: the trajectory of plain torch in one process, as every layout has without compiling."""

from dataclasses import replace
from typing import Any

import pytest

from raptr_ds.model.compiler import missing_compiler
from tests.dist.test_layouts import LOSS, NORM, RUNS, reference
from tests.dist.trajectory import Case, run_case, weights_differ
from tests.dist.workers import run_distributed

# Branches without a factor, in paths of any length: a graph less for two ranks to compile at once.
UNSCALED = (("residual_scale", "none"),)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing_compiler() is not None, reason=f"cannot compile here: {missing_compiler()}"),
]


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        (RUNS["bert-freeze"], {"zero": 2}),
        (replace(RUNS["ul2-freeze"], path_keys=UNSCALED), {"tensor": 2, "recompute": True}),
        (replace(RUNS["bert-freeze"], path_keys=UNSCALED), {"tensor": 2, "sequence_parallel": True}),
        (RUNS["bert-zero_grad"], {"pipeline": 2}),
    ],
    ids=["DP2 ZeRO 2", "TP2, recompute", "TP2 SP", "PP2"],
)
def test_a_compiled_layout_follows_the_reference(case: Case, layout: dict[str, Any]) -> None:
    expected = reference(case)
    found = run_distributed(run_case, 2, replace(case, compile=True, **layout), timeout=280)[0]
    assert found.losses == pytest.approx(expected.losses, rel=LOSS)
    assert found.grad_norms == pytest.approx(expected.grad_norms, rel=NORM)
    assert found.eval_loss == pytest.approx(expected.eval_loss, rel=LOSS)
    assert weights_differ(found.weights, expected.weights) < 0.02 * case.steps * case.learning_rate
