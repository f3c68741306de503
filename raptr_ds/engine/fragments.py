"""State by canonical parameter name: which part of which full tensor a local tensor holds, in any layout.

A layout says by `Holder`s where its fp32 weights lie in the tensors that the inner optimizer steps; the optimizer's
states lie there in the same way. `Fragment`s are the same weights and states cut into one piece for each parameter.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from raptr_ds.parallel.layers import shard_of

WEIGHT = "weight"
STEP = "step"


@dataclass(frozen=True)
class Geometry:
    """Which elements of a full tensor a flat run holds.

    The full tensor is narrowed to `start:start + size` along `dim` (whole where dim is None), zero-padded to
    `local_shape` and flattened; the run is its elements from `offset` to `offset + numel`.
    """

    full_shape: tuple[int, ...]
    dim: int | None
    start: int
    size: int
    local_shape: tuple[int, ...]
    offset: int
    numel: int

    @classmethod
    def of_run(cls, parameter: nn.Parameter, local_shape: torch.Size, offset: int, numel: int) -> "Geometry":
        """Return the geometry of a run of this rank's part of a parameter, which ZeRO 3 may have emptied."""
        shard = shard_of(parameter)
        return cls(shard.full_shape, shard.dim, shard.start, shard.size, tuple(local_shape), offset, numel)

    @classmethod
    def of_whole(cls, tensor: torch.Tensor) -> "Geometry":
        """Return the geometry of a full tensor itself."""
        shape = tuple(tensor.shape)
        return cls(shape, None, 0, 0, shape, 0, tensor.numel())


@dataclass(frozen=True)
class Fragment:
    """A weight (fp32) or a state of one parameter, as far as this rank holds it, as a 1-D view.

    kind: `weight` or the optimizer's state key (`exp_avg`, ...).
    """

    name: str
    kind: str
    geometry: Geometry
    data: torch.Tensor


@dataclass(frozen=True)
class Piece:
    """A run of one parameter, which lies in a flat optimizer parameter from element `start` on."""

    name: str
    geometry: Geometry
    start: int


@dataclass(frozen=True)
class Holder:
    """One tensor that the inner optimizer steps, its parameter group, and its pieces.

    names: the parameters that are stepped with it, including those of which this rank holds no piece.
    """

    flat: torch.Tensor
    group: dict[str, Any]
    names: tuple[str, ...]
    pieces: tuple[Piece, ...]

    @classmethod
    def of_whole(cls, name: str, parameter: nn.Parameter, tensor: torch.Tensor, group: dict[str, Any]) -> "Holder":
        """Return the holder of a parameter that has a tensor of its own."""
        geometry = Geometry.of_run(parameter, parameter.shape, 0, tensor.numel())
        return cls(tensor, group, (name,), (Piece(name, geometry, 0),))


def state_kinds(state: Mapping[str, Any], flat: torch.Tensor) -> list[str]:
    """Return the keys of an optimizer state that have one value for each element of `flat`."""
    return [key for key, value in state.items() if isinstance(value, torch.Tensor) and value.shape == flat.shape]


def weight_and_states(tensor: torch.Tensor, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return a tensor that the optimizer steps, and its states of the same shape, by kind."""
    state = optimizer.state.get(tensor, {})
    return {WEIGHT: tensor.detach(), **{kind: state[kind] for kind in state_kinds(state, tensor)}}


def fragments_of(holders: Iterable[Holder], optimizer: torch.optim.Optimizer) -> list[Fragment]:
    """Return the weights and states of the holders, one fragment for each piece and kind."""
    found = []
    for holder in holders:
        tensors = weight_and_states(holder.flat, optimizer)
        for piece in holder.pieces:
            for kind, tensor in tensors.items():
                data = tensor.detach().view(-1).narrow(0, piece.start, piece.geometry.numel)
                found.append(Fragment(piece.name, kind, piece.geometry, data))
    return found


def step_counts(holders: Iterable[Holder], optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return how many steps the optimizer has made on each parameter; under `freeze` layers differ.

    All tensors of a group are stepped together, but DeepSpeed's fused optimizers count on the last one only
    (ops/adam/fused_adam.py), so the group's count is the largest.
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
    """Replace the optimizer's states by zeros of these kinds, to be filled from a checkpoint, and set step counts.

    kinds and counts are keyed by canonical parameter name.
    """
    for holder in holders:
        names = holder.names
        wanted = set().union(*(kinds.get(name, set()) for name in names)) - {WEIGHT}
        if wanted and holder.group.get("amsgrad"):  # torch's Adam makes all of its states, or none
            wanted.add("max_exp_avg_sq")
        state: dict[str, Any] = {kind: torch.zeros_like(holder.flat).detach() for kind in sorted(wanted)}
        count = next((counts[name] for name in names if name in counts), None)
        if wanted and count is not None:  # without state the optimizer starts its own count
            state = {STEP: _step_counter(optimizer, holder, count), **state}
        optimizer.state[holder.flat] = state


def _step_counter(optimizer: torch.optim.Optimizer, holder: Holder, count: float) -> torch.Tensor | int:
    """Return a step count in the optimizer's own form: a tensor for torch's, an int for DeepSpeed's."""
    if not type(optimizer).__module__.startswith("torch."):
        return int(count)
    beside_weights = holder.group.get("fused") or holder.group.get("capturable")
    return torch.tensor(count, dtype=torch.float32, device=holder.flat.device if beside_weights else "cpu")
