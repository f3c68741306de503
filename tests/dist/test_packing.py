"""Packed sequences in layouts: every stage and rank masks the same examples."""

from dataclasses import replace
from typing import Any

import pytest

from tests.dist.test_layouts import LOSS, NORM, RUNS, reference
from tests.dist.trajectory import run_case, weights_differ
from tests.dist.workers import run_distributed


@pytest.mark.parametrize("run", ["bert-freeze", "ul2-freeze"])
@pytest.mark.parametrize(
    "changes",
    [
        {"zero": 2},
        {"tensor": 2, "recompute": True, "micro_batch": 4},
        {"tensor": 2, "sequence_parallel": True, "micro_batch": 4},
        {"pipeline": 2},
    ],
    ids=["DP2 ZeRO 2", "TP2, recompute", "TP2 SP", "PP2"],
)
def test_a_packed_layout_follows_the_reference(run: str, changes: dict[str, Any]) -> None:
    case = replace(RUNS[run], packed=True)
    expected = reference(case)
    found = run_distributed(run_case, 2, replace(case, **changes))[0]
    assert found.losses == pytest.approx(expected.losses, rel=LOSS)
    assert found.grad_norms == pytest.approx(expected.grad_norms, rel=NORM)
    assert found.eval_loss == pytest.approx(expected.eval_loss, rel=LOSS)
    assert weights_differ(found.weights, expected.weights) < 0.02 * case.steps * case.learning_rate
    assert expected.losses != pytest.approx(reference(RUNS[run]).losses, rel=1e-3)  # packing is not nothing
