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
    """Return how many steps the optimizer has made on each parameter; under `freeze` layers differ."""
    counts = {}
    for holder in holders:
        count = optimizer.state.get(holder.flat, {}).get(STEP, holder.group.get(STEP))
        if count is not None:
            counts.update({name: float(count) for name in holder.names})
    return counts


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
        if STEP in holder.group:
            holder.group[STEP] = int(count or 0)
        elif count is not None:
            state = {STEP: torch.tensor(count, dtype=torch.float32), **state}
        optimizer.state[holder.flat] = state
