"""Linears split over tensor ranks, with and without sequence parallelism: plain torch's values and gradients."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from raptr_ds.model.stage import build_stage
from raptr_ds.parallel import layers
from raptr_ds.parallel.groups import initialize_process_groups
from raptr_ds.parallel.launch import Launch
from raptr_ds.parallel.layers import ColumnLinear, GatedColumnLinear, RowLinear
from raptr_ds.parallel.sequence import Arriving, pick_positions
from raptr_ds.paths import LayerPath
from tests.dist.trajectory import HIDDEN as MODEL_WIDTH
from tests.dist.trajectory import SEED, SEQ_LENGTH, Case, batch_at, model_of, process_groups
from tests.dist.workers import run_distributed
from tests.dropout_masks import streams_of

BATCH, LENGTH, HIDDEN, INNER = 3, 8, 12, 16
CHOSEN = {0: [2, 3, 6, 7], 1: [0, 1], 2: [], 3: [4, 5]}  # of a rank's inner features, by rank


def setting(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def on_this_rank(launch: Launch, kind: str, bias: bool, along_sequence: bool, parts: bool) -> dict[str, float]:
    """Return the largest differences of an MLP's output and gradients from plain torch's on this rank."""
    groups = initialize_process_groups(launch, launch.world_size, 1, sequence_parallel=along_sequence)
    layers.reads_rows_apart = lambda _device: kind == "two products"
    is_gated, rank, size = kind != "plain", groups.tensor_rank, groups.topology.tensor
    rows = 2 * INNER if is_gated else INNER
    whole = {
        "x": setting(1, BATCH, LENGTH, HIDDEN),
        "expand": setting(2, rows, HIDDEN),
        "expand bias": setting(3, rows),
        "contract": setting(4, HIDDEN, INNER),
        "contract bias": setting(5, HIDDEN),
    }
    sequence = slice(rank * LENGTH // size, (rank + 1) * LENGTH // size) if along_sequence else slice(None)
    first, last = (
        slice(rank * rows // size, (rank + 1) * rows // size),
        slice(rank * INNER // size, (rank + 1) * INNER // size),
    )
    here = {"x": (slice(None), sequence), "expand": first, "expand bias": first, "contract": (slice(None), last)}

    expand = (GatedColumnLinear if is_gated else ColumnLinear)(HIDDEN, rows, bias, groups).double()
    contract = RowLinear(INNER, HIDDEN, bias, groups).double()
    ours = {"expand": expand.weight, "contract": contract.weight}
    ours |= {"expand bias": expand.bias, "contract bias": contract.bias} if bias else {}
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(whole[name][here.get(name, slice(None))])
    ours["x"] = whole["x"][here["x"]].clone().requires_grad_()
    chosen = torch.tensor([i for i in CHOSEN[rank] if i < INNER // size]).long()
    pairs = (2 * chosen[:, None] + torch.arange(2)).flatten() if is_gated else chosen
    inner = expand.of_rows(ours["x"], pairs) if parts else expand(ours["x"])
    inner = functional.silu(inner[0]) * inner[1] if is_gated else functional.gelu(inner)
    y = contract.of_columns(inner, chosen) if parts else contract(inner)
    weights = setting(6, BATCH, LENGTH, HIDDEN)
    (y * weights[:, sequence]).sum().backward()

    plain = {name: whole[name].clone().requires_grad_() for name in ours}
    hidden = functional.linear(plain["x"], plain["expand"], plain.get("expand bias"))
    hidden = functional.silu(hidden[..., 0::2]) * hidden[..., 1::2] if is_gated else functional.gelu(hidden)
    if parts:
        every = [r * INNER // size + i for r in range(size) for i in CHOSEN[r] if i < INNER // size]
        hidden = hidden * torch.zeros(INNER, dtype=torch.float64).index_fill(0, torch.tensor(every), 1.0)
    expected = functional.linear(hidden, plain["contract"], plain.get("contract bias"))
    (expected * weights).sum().backward()
    differences = {"output": _difference(y, expected[:, sequence])}
    for name, value in ours.items():
        differences[name] = _difference(value.grad, plain[name].grad[here.get(name, slice(None))])  # type: ignore[index]
    return differences


def _difference(one: Any, other: torch.Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max().clamp(min=1)).item()


@pytest.mark.parametrize("parts", [False, True], ids=["whole", "parts"])
@pytest.mark.parametrize("along_sequence", [False, True], ids=["copies", "along the sequence"])
@pytest.mark.parametrize(
    ("kind", "bias", "size"),
    [
        ("plain", True, 2),
        ("two products", True, 2),
        ("one product", True, 2),
        ("plain", False, 4),
        ("one product", False, 4),
    ],
)
def test_split_linears(kind: str, bias: bool, size: int, along_sequence: bool, parts: bool) -> None:
    for differences in run_distributed(on_this_rank, size, kind, bias, along_sequence, parts):
        assert len(differences) == (6 if bias else 4)
        assert max(differences.values()) < 1e-13, differences


class Events(TorchDispatchMode):
    """Notes products and collectives in the order in which they begin, and when a collective is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "c10d":
            self.seen.append("send")
        elif name in {"mm", "addmm_"}:
            self.seen.append("product")
        return func(*args, **(kwargs or {}))


def backward_events(launch: Launch, kind: str, along_sequence: bool) -> list[str]:
    """Return what happens in the backward pass of a column linear."""
    groups = initialize_process_groups(launch, launch.world_size, 1, sequence_parallel=along_sequence)
    layers.reads_rows_apart = lambda _device: kind == "two products"
    linear = (ColumnLinear if kind == "plain" else GatedColumnLinear)(HIDDEN, 2 * INNER, False, groups)
    y = linear(torch.ones(BATCH, LENGTH // 2 if along_sequence else LENGTH, HIDDEN, requires_grad=True))
    loss = sum(part.sum() for part in (y if isinstance(y, tuple) else (y,)))
    take = Arriving.take
    with Events() as events:

        def noted(arriving: Arriving) -> torch.Tensor:
            events.seen.append("wait")
            return take(arriving)

        Arriving.take = noted
        loss.backward()  # type: ignore[union-attr]
    return events.seen


@pytest.mark.parametrize(("kind", "products"), [("plain", 1), ("two products", 2), ("one product", 1)])
@pytest.mark.parametrize("along_sequence", [False, True], ids=["copies", "along the sequence"])
def test_what_is_sent_travels_during_the_products(kind: str, products: int, along_sequence: bool) -> None:
    """The sum of x's gradient during the weight's; before, x is gathered again during the product of x's gradient."""
    product = ["product"] * products
    expected = (
        ["send", *product, "send", "wait", *product, "wait"] if along_sequence else [*product, "send", *product, "wait"]
    )
    for events in run_distributed(backward_events, 2, kind, along_sequence):
        assert events == expected


class Sent(TorchDispatchMode):
    """Counts collectives by kind and by the elements of their larger side."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind = next(kind for kind in ("gather", "scatter", "reduce") if kind in func.overloadpacket.__name__)
            sizes = [leaf.numel() for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            self.counts[kind, max(sizes)] += 1
        return func(*args, **(kwargs or {}))


def sent_by_a_layer(launch: Launch, case: Case) -> list[dict[tuple[str, int], int]]:
    """Return what one more layer sends forward and backward."""
    groups = process_groups(launch, case)
    stage = build_stage(model_of(case), groups, range(case.num_layers), case.recompute, SEED)
    micro = batch_at(case, groups, 0).micro_batches[0]
    counts = []
    for path_length in (1, 2):
        path = LayerPath(tuple(range(path_length)), case.num_layers)
        with Sent() as forward:
            losses = stage(micro.tokens, micro, path, streams_of(SEED, 0, micro.sample_ids))
        with Sent() as backward:
            losses.sum().backward()
        counts.append((forward.counts, backward.counts))
    return [dict(two - one) for one, two in zip(*counts, strict=True)]


@pytest.mark.parametrize(("architecture", "norm_parameters"), [("bert", 4), ("ul2", 2)])
def test_a_layer_sends_what_the_table_says(architecture: str, norm_parameters: int) -> None:
    """docs/scaling.md, "Tensor ranks and the sequence"."""
    case = Case(architecture=architecture, tensor=2)
    stream = case.micro_batch * SEQ_LENGTH * MODEL_WIDTH
    for sent in run_distributed(sent_by_a_layer, 2, case):
        assert sent == [{("reduce", stream): 2}, {("reduce", stream): 2}]
    for forward, backward in run_distributed(sent_by_a_layer, 2, replace(case, sequence_parallel=True)):
        assert forward == {("gather", stream): 2, ("scatter", stream): 2}
        norms = {("reduce", MODEL_WIDTH): norm_parameters}
        assert backward == {("gather", stream): 4, ("scatter", stream): 2, **norms}


def picked(launch: Launch) -> tuple[bool, bool]:
    """Return whether picked positions, and their gradient, are those of the whole stream."""
    groups = initialize_process_groups(launch, launch.world_size, 1, sequence_parallel=True)
    size = LENGTH // launch.world_size
    here = slice(groups.tensor_rank * size, (groups.tensor_rank + 1) * size)
    whole = setting(1, BATCH, LENGTH, HIDDEN).requires_grad_()
    part = whole.detach()[:, here].clone().requires_grad_()
    positions = torch.tensor([0, 3, 7, 9, 9, 14, BATCH * LENGTH - 1])
    weights = setting(2, len(positions), HIDDEN)
    expected = whole.flatten(0, 1)[positions]
    found = pick_positions(part, positions, groups)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    assert whole.grad is not None
    assert part.grad is not None
    return torch.equal(found, expected), torch.equal(part.grad, whole.grad[:, here])


@pytest.mark.parametrize("size", [2, 4])
def test_positions_are_picked_from_whole_sequences(size: int) -> None:
    assert run_distributed(picked, size) == [(True, True)] * size
