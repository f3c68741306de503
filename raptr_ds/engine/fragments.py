"""State by canonical name: which part of which full tensor a local tensor holds, whatever the layout."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from raptr_ds.parallel.layers import TensorShard, shard_of

WEIGHT = "weight"
STEP = "step"


@dataclass(frozen=True)
class Fragment:
    """A contiguous run of this rank's part of a full tensor.

    The full tensor is narrowed to `shard`, padded to `local_shape` and flattened; `data` (1-D, live) holds the
    elements from `offset` on. kind: `weight` (fp32) or the optimizer's state key (`exp_avg`, ...).
    """

    name: str
    kind: str
    shard: TensorShard
    local_shape: tuple[int, ...]
    offset: int
    data: torch.Tensor


@dataclass(frozen=True)
class Piece:
    """Where a run of one parameter lies in a flat optimizer parameter; counts in elements."""

    name: str
    parameter: nn.Parameter
    local_shape: tuple[int, ...]
    offset: int  # in the flattened local parameter
    start: int  # in the flat optimizer parameter
    size: int


@dataclass(frozen=True)
class Holder:
    """One tensor that the inner optimizer steps, the group it is in, and what it consists of.

    names: the parameters that step with it, also those of which this rank holds no piece.
    """

    flat: torch.Tensor
    group: dict[str, Any]
    names: tuple[str, ...]
    pieces: tuple[Piece, ...]


def state_kinds(state: Mapping[str, Any], flat: torch.Tensor) -> list[str]:
    """Return the keys of an optimizer's state that have one value for each element of its parameter."""
    return [key for key, value in state.items() if isinstance(value, torch.Tensor) and value.shape == flat.shape]


def fragments_of(holders: Iterable[Holder], optimizer: torch.optim.Optimizer) -> list[Fragment]:
    """Return weights and states of the holders, piece by piece."""
    found = []
    for holder in holders:
        state = optimizer.state.get(holder.flat, {})
        tensors = {WEIGHT: holder.flat, **{kind: state[kind] for kind in state_kinds(state, holder.flat)}}
        for piece in holder.pieces:
            for kind, tensor in tensors.items():
                data = tensor.detach().view(-1).narrow(0, piece.start, piece.size)
                shard = shard_of(piece.parameter)
                found.append(Fragment(piece.name, kind, shard, piece.local_shape, piece.offset, data))
    return found


def step_counts(holders: Iterable[Holder], optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return how many steps the optimizer has made on each parameter; under `freeze` layers differ.

    All tensors of a group step together, but DeepSpeed's fused optimizers count on the last of them only
    (ops/adam/fused_adam.py), so the largest count is the group's.
    """
    holders = list(holders)
    of_group: dict[int, float] = {}
    for holder in holders:
        count = optimizer.state.get(holder.flat, {}).get(STEP)
        if count is not None:
            group = id(holder.group)
            of_group[group] = max(float(count), of_group.get(group, 0.0))
    return {name: of_group[id(h.group)] for h in holders if id(h.group) in of_group for name in h.names}


def create_state(
    holders: Iterable[Holder],
    optimizer: torch.optim.Optimizer,
    kinds: Mapping[str, set[str]],
    counts: Mapping[str, float],
) -> None:
    """Make the states that a checkpoint has (zero, to be filled) and set step counts; drop states that it has not.

    kinds and counts are keyed by canonical parameter name.
    """
    for holder in holders:
        names = holder.names
        wanted = set().union(*(kinds.get(name, set()) for name in names)) - {WEIGHT}
        state: dict[str, Any] = {kind: torch.zeros_like(holder.flat).detach() for kind in sorted(wanted)}
        count = next((counts[name] for name in names if name in counts), None)
        if wanted and count is not None:  # without state an optimizer begins to count by itself
            state = {STEP: counter_like(optimizer, holder, count), **state}
        optimizer.state[holder.flat] = state


def counter_like(optimizer: torch.optim.Optimizer, holder: Holder, count: float) -> torch.Tensor | int:
    """Return a step count as the optimizer keeps it: torch's in a tensor, DeepSpeed's in an int for their kernels."""
    if not type(optimizer).__module__.startswith("torch."):
        return int(count)
    beside_weights = holder.group.get("fused") or holder.group.get("capturable")
    return torch.tensor(count, dtype=torch.float32, device=holder.flat.device if beside_weights else "cpu")
