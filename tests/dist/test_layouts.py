"""One trajectory: in fp32 every layout gives the losses, norms and weights of plain torch in one process.

Tolerances are fp32 rounding. Layouts sum in other orders, which is about 1e-7 relative a step: over 50 steps the
largest differences seen are 2.7e-7 in the loss, 8e-7 in the norm and, in fewer steps of zero_grad, 1.3e-5 in a weight,
where AdamW divides a gradient that is rounding noise by its own size. The errors these tests look for (a stale
gradient, a wrong mean, a norm that counts twice) are 1e-3 and more in the loss.
"""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from raptr_ds.parallel.groups import initialize_process_groups
from raptr_ds.parallel.launch import Launch
from tests.dist.trajectory import (
    Case,
    Outcome,
    batch_at,
    build_engine,
    full_weights,
    path_method,
    run_case,
    weights_differ,
)
from tests.dist.workers import run_distributed

LOSS, NORM = 1e-6, 2e-6  # relative
WEIGHT = 0.05  # of the learning rate, so of what one step may move

SIX = Case(steps=6)  # two in each phase: a layer is active, skipped, and active again
RUNS = {
    "bert-freeze": SIX,
    "bert-freeze-50-steps": Case(steps=50),
    "bert-freeze-no-dropout": replace(SIX, dropout=0.0),
    "bert-zero_grad": replace(SIX, skipped_update="zero_grad"),
    "ul2-freeze": replace(SIX, architecture="ul2"),
    "ul2-zero_grad-untied": replace(SIX, architecture="ul2", skipped_update="zero_grad", tied=False),
    "bert-stacking": replace(SIX, method="stacking", schedule="1-3-5"),
    "ul2-stacking-fresh": replace(
        SIX,
        architecture="ul2",
        method="stacking",
        schedule="2-3-5",
        growth_optimizer_state="fresh",
        growth_warmup_steps=2,
    ),
    "bert-3-paths": replace(SIX, paths_per_step=3, schedule="2-4-5"),
    "ul2-3-paths-zero_grad": replace(
        SIX, architecture="ul2", paths_per_step=3, schedule="2-4-5", skipped_update="zero_grad"
    ),
    "bert-width": replace(SIX, method="width", schedule="1-3-4", num_layers=3),
    "ul2-width-zero_grad": replace(
        SIX, architecture="ul2", method="width", schedule="2-3-4", num_layers=3, skipped_update="zero_grad"
    ),
}

# A tensor rank sends several times a layer, and each time costs it about a millisecond of CPU: these have two or three
# micro batches a step.
LAYOUTS = {
    "one process": (1, {}),
    "one process, ZeRO 3": (1, {"zero": 3}),
    "DP2": (2, {}),
    "DP2, growing micro batches": (2, {"micro_batch": 1, "micro_batches": (6, 2, 1)}),
    "DP2 ZeRO 1": (2, {"zero": 1}),
    "DP2 ZeRO 1, recompute on long paths": (2, {"zero": 1, "recompute": True, "keep_activations_up_to": 3}),
    "DP2 ZeRO 2": (2, {"zero": 2}),
    "DP2 ZeRO 2, all accumulated": (2, {"zero": 2, "micro_batch": 1}),
    "DP2 ZeRO 2, growing micro batches": (2, {"zero": 2, "micro_batch": 1, "micro_batches": (3, 2, 1)}),
    # Less than a layer's gradients, more than any one.
    "DP2 ZeRO 1, small buckets": (2, {"zero": 1, "reduce_bucket": 5000}),
    "DP2 ZeRO 2, small buckets": (2, {"zero": 2, "reduce_bucket": 5000}),
    # What a GPU's runs do by default; small buckets are sent during the backward pass.
    "DP2 ZeRO 1, overlapped": (2, {"zero": 1, "overlap": True, "reduce_bucket": 5000}),
    "DP2 ZeRO 2, overlapped": (2, {"zero": 2, "overlap": True, "reduce_bucket": 5000}),
    "DP2 ZeRO 2, overlapped, growing micro batches": (
        2,
        {"zero": 2, "overlap": True, "micro_batch": 1, "micro_batches": (3, 2, 1)},
    ),
    "DP2 ZeRO 1, round robin": (2, {"zero": 1, "round_robin": True}),
    "DP3 ZeRO 2, round robin": (3, {"zero": 2, "micro_batch": 4, "round_robin": True}),
    "DP2 ZeRO 3, small buckets": (2, {"zero": 3, "reduce_bucket": 5000}),
    "DP2 ZeRO 3": (2, {"zero": 3, "micro_batch": 3}),
    "DP2 ZeRO 3, three micro batches": (2, {"zero": 3}),
    "DP2 ZeRO 3, growing micro batches": (2, {"zero": 3, "micro_batch": 1, "micro_batches": (6, 3, 1)}),
    "DP2 ZeRO 3, recompute on long paths": (2, {"zero": 3, "recompute": True, "keep_activations_up_to": 4}),
    "DP3 ZeRO 1": (3, {"zero": 1, "micro_batch": 4}),
    "DP3 ZeRO 3": (3, {"zero": 3, "micro_batch": 2}),
    "DP4 ZeRO 2": (4, {"zero": 2, "micro_batch": 3}),
    "TP2": (2, {"tensor": 2, "micro_batch": 4}),
    "TP2 DP2 ZeRO 1, recompute": (4, {"tensor": 2, "zero": 1, "recompute": True, "micro_batch": 3}),
    "TP4": (4, {"tensor": 4, "micro_batch": 6}),
    "TP2 DP2 ZeRO 2": (4, {"tensor": 2, "zero": 2, "micro_batch": 3}),
    "TP2 DP2 ZeRO 3": (4, {"tensor": 2, "zero": 3, "micro_batch": 3}),
    "TP2 DP2 ZeRO 3, three micro batches": (4, {"tensor": 2, "zero": 3}),
    "TP2 SP": (2, {"tensor": 2, "sequence_parallel": True, "micro_batch": 4}),
    "TP4 SP": (4, {"tensor": 4, "sequence_parallel": True, "micro_batch": 6}),
    "TP2 SP DP2": (4, {"tensor": 2, "sequence_parallel": True, "micro_batch": 3}),
    "TP2 SP DP2 ZeRO 1, recompute": (
        4,
        {"tensor": 2, "sequence_parallel": True, "zero": 1, "recompute": True, "micro_batch": 3},
    ),
    "TP2 SP DP2 ZeRO 2": (4, {"tensor": 2, "sequence_parallel": True, "zero": 2, "micro_batch": 3}),
    "TP2 SP DP2 ZeRO 3": (4, {"tensor": 2, "sequence_parallel": True, "zero": 3, "micro_batch": 3}),
    "PP2": (2, {"pipeline": 2}),
    "PP2 DP2 ZeRO 1, recompute": (4, {"pipeline": 2, "zero": 1, "recompute": True}),
    "PP2 uneven": (2, {"pipeline": 2, "pipeline_layers": (1, 4)}),
    "PP2 DP2": (4, {"pipeline": 2, "micro_batch": 1}),
    "PP2 DP2 ZeRO 1": (4, {"pipeline": 2, "zero": 1}),
    "PP2 TP2": (4, {"pipeline": 2, "tensor": 2, "micro_batch": 4}),
    "PP2 TP2 SP": (4, {"pipeline": 2, "tensor": 2, "sequence_parallel": True, "micro_batch": 4}),
    "PP4": (4, {"pipeline": 4}),
    "PP4, four micro batches": (4, {"pipeline": 4, "micro_batch": 3}),
}

# For the long run, which is about steps: as few micro batches as there can be.
LONG_LAYOUTS = {
    "DP2 ZeRO 1, one micro batch": (2, {"zero": 1, "micro_batch": 6}),
    "DP2 ZeRO 3, one micro batch": (2, {"zero": 3, "micro_batch": 6}),
    "PP2 TP2 SP, two micro batches": (
        4,
        {"pipeline": 2, "tensor": 2, "sequence_parallel": True, "micro_batch": 6},
    ),
}

FEW = ("DP2 ZeRO 1", "DP2 ZeRO 3", "TP2", "TP2 SP DP2 ZeRO 3", "PP2 DP2 ZeRO 1, recompute", "PP2 TP2 SP", "PP4")

# Where growth copies between ranks, or between parts that are cut in another way.
GROWING = (*FEW, "DP3 ZeRO 3", "DP2 ZeRO 2", "DP3 ZeRO 2, round robin", "TP2 DP2 ZeRO 3", "PP2", "PP2 DP2 ZeRO 1")

# Where gradients accumulate in another way; there must be a multiple of three micro batches.
SEVERAL_PATHS = {
    "bert-3-paths": (
        "DP2",
        "DP2 ZeRO 1",
        "DP2 ZeRO 2",
        "DP2 ZeRO 2, all accumulated",
        "DP2 ZeRO 3, three micro batches",
        "TP2 DP2 ZeRO 3, three micro batches",
        "PP2",
        "PP2 DP2 ZeRO 1, recompute",
        "PP2 TP2 SP",
    ),
    "ul2-3-paths-zero_grad": ("DP2 ZeRO 1", "DP2 ZeRO 2", "DP2 ZeRO 3, three micro batches", "PP2 DP2"),
}

# Freezing parts needs whole tensors in the optimizer; with one head of four some tensor ranks have none.
WIDTHS = {
    "bert-width": ("DP2", "TP2", "TP2 SP", "TP4", "TP4 SP", "PP2", "PP2 TP2"),
    "ul2-width-zero_grad": (
        "DP2 ZeRO 2",
        "DP2 ZeRO 3",
        "TP2 DP2 ZeRO 1, recompute",
        "TP2 DP2 ZeRO 3",
        "TP2 SP DP2 ZeRO 3",
        "PP2 TP2",
    ),
}

# One run across two phase boundaries in every layout, and long in three; the others, shorter, in a few.
PAIRS = [("bert-freeze", layout) for layout in LAYOUTS if "three micro batches" not in layout] + [
    (run, layout)
    for run in RUNS
    for layout in {
        "bert-freeze": (),
        "bert-freeze-50-steps": tuple(LONG_LAYOUTS),
        "bert-stacking": GROWING,
        **SEVERAL_PATHS,
        **WIDTHS,
    }.get(run, FEW)
]


@cache
def reference(case: Case) -> Outcome:
    """Return the oracle's outcome: plain torch, the global batch in one piece, or one for each path of a step."""
    alone = replace(case, engine="reference", micro_batch=case.global_batch // case.paths_per_step)
    return run_distributed(run_case, 1, alone)[0]


@pytest.mark.parametrize(("run", "layout"), PAIRS, ids=[f"{run}: {layout}" for run, layout in PAIRS])
def test_layout_follows_the_reference(run: str, layout: str) -> None:
    case = RUNS[run]
    world_size, changes = (LAYOUTS | LONG_LAYOUTS)[layout]
    expected = reference(case)
    outcomes = run_distributed(run_case, world_size, replace(case, **changes))
    for outcome in outcomes:  # every rank reports the same
        assert outcome.losses == outcomes[0].losses
        assert outcome.grad_norms == outcomes[0].grad_norms
    found = outcomes[0]
    assert found.losses == pytest.approx(expected.losses, rel=LOSS)
    assert found.grad_norms == pytest.approx(expected.grad_norms, rel=NORM)
    assert found.eval_loss == pytest.approx(expected.eval_loss, rel=LOSS)
    assert weights_differ(found.weights, expected.weights) < WEIGHT * case.learning_rate


def test_the_reference_takes_accumulation_for_what_it_is() -> None:
    """The oracle itself: one piece or twelve, the same mean over predicted positions."""
    case = replace(RUNS["bert-freeze"], engine="reference", micro_batch=1)
    outcome = run_distributed(run_case, 1, case)[0]
    assert outcome.losses == pytest.approx(reference(RUNS["bert-freeze"]).losses, rel=LOSS)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_freeze_leaves_a_skipped_layer_alone(zero: int) -> None:
    """A layer that no path of the run takes keeps its initial weights bit for bit, in every stage."""
    case = Case(schedule="2-5", steps=2, zero=zero)
    assert path_method(case).path_at(0).layers == (0, 4)
    outcome = run_distributed(run_first_step, 2, case)[0]
    moved = {name for name, (before, after) in outcome.items() if (before != after).any()}
    assert moved
    assert not {name for name in moved if name.startswith(("layers.1.", "layers.2.", "layers.3."))}
    assert any(name.startswith("layers.0.") for name in moved)


def run_first_step(launch: Launch, case: Case) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return (before, after) of every weight around the first step (rank 0)."""
    groups = initialize_process_groups(launch, case.tensor, case.pipeline)
    engine = build_engine(case, groups)
    before = full_weights(engine, groups)
    path = path_method(case).path_at(0)
    engine.train_step(batch_at(case, groups, 0), path, 0, case.learning_rate)
    after = full_weights(engine, groups)
    return {name: (before[name], after[name]) for name in before}


@pytest.mark.parametrize(("tensor", "world_size"), [(1, 1), (2, 4)])
def test_freeze_leaves_idle_heads_and_mlp_blocks_alone(tensor: int, world_size: int) -> None:
    """Rows and columns of parts that have not run keep their initial weights bit for bit; all others move."""
    case = Case(method="width", schedule="2-4", num_layers=2, steps=2, tensor=tensor)
    outcome = run_distributed(run_first_step, world_size, case)[0]
    parts = path_method(case).path_at(0).parts
    assert parts is not None
    for layer in range(2):
        for name, dim, chosen in (
            ("attention.qkv.weight", 0, parts.heads),
            ("attention.qkv.bias", 0, parts.heads),
            ("attention.output.weight", 1, parts.heads),
            ("mlp.expand.weight", 0, parts.blocks),
            ("mlp.expand.bias", 0, parts.blocks),
            ("mlp.contract.weight", 1, parts.blocks),
        ):
            before, after = outcome[f"layers.{layer}.{name}"]
            pieces = zip(np.split(before, 4, axis=dim), np.split(after, 4, axis=dim), strict=True)
            moved = [bool((one != other).any()) for one, other in pieces]
            assert moved == [part in chosen[layer] for part in range(4)], name
        for name in ("attention_norm.weight", "attention.output.bias", "mlp_norm.weight", "mlp.contract.bias"):
            before, after = outcome[f"layers.{layer}.{name}"]
            assert (before != after).any(), name
