"""Heads and MLP blocks that do not run in a step stay unchanged under `skipped_update: freeze`: they are saved before
the optimizer's step and restored after it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from raptr_ds.engine.fragments import weight_and_states
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.parallel.layers import pieces
from raptr_ds.parallel.transfer import without_waiting
from raptr_ds.paths.path import Parts


@contextmanager
def idle_parts_kept(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[tuple[nn.Parameter, torch.Tensor, int]],
    parts: Parts | None,
    groups: ProcessGroups,
) -> Iterator[None]:
    """Restore the weights and states of idle heads and MLP blocks after the optimizer step in the block.

    parameters: working weight, the fp32 tensor that the optimizer steps, layer. parts: what ran; None keeps nothing.
    A state that this step creates is zero there: weight decay that is part of the gradient (SGD's, Adam's with
    adam_w_mode=false) would be in it. The step count is the whole layer's.
    """
    if parts is None:
        yield
        return
    kept = []
    with torch.no_grad():
        for parameter, master, layer in parameters:
            if (idle := _idle_elements(parameter, layer, parts, groups)) is not None:
                tensors = weight_and_states(master, optimizer)
                kept.append((master, *idle, {kind: tensor.index_select(*idle) for kind, tensor in tensors.items()}))
        yield
        for master, dim, elements, values in kept:
            for kind, tensor in weight_and_states(master, optimizer).items():
                if kind in values:
                    tensor.index_copy_(dim, elements, values[kind])
                else:
                    tensor.index_fill_(dim, elements, 0.0)


def _idle_elements(
    parameter: nn.Parameter, layer: int, parts: Parts, groups: ProcessGroups
) -> tuple[int, torch.Tensor] | None:
    """Return (dim, indices) of what is idle in this rank's part of a parameter; None if nothing is."""
    if not hasattr(parameter, "parts"):
        return None
    kind, dim = parameter.parts  # type: ignore[attr-defined]
    here = parts.number // groups.topology.tensor
    size = parameter.shape[dim] // here
    active = getattr(parts, kind)[layer]
    idle = [part for part in range(here) if groups.tensor_rank * here + part not in active]
    if not idle:
        return None
    return dim, pieces(without_waiting(torch.tensor(idle), parameter.device), size)
