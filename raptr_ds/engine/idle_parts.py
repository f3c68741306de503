"""Parts of layers that sit out a step under `skipped_update: freeze`: put back after the optimizer's step."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from raptr_ds.engine.fragments import state_kinds
from raptr_ds.parallel.layers import pieces
from raptr_ds.parallel.transfer import without_waiting
from raptr_ds.paths.path import LayerPath


@contextmanager
def idle_parts_kept(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[tuple[nn.Parameter, torch.Tensor, int]],
    path: LayerPath,
    tensor_rank: int,
    tensor_size: int,
) -> Iterator[None]:
    """Let an optimizer step inside leave weights and states of idle heads and MLP blocks alone.

    parameters: working weight, the fp32 tensor that the optimizer steps, layer. Their gradients are zero, so that a
    state which the step creates is zero there; the step count is the whole layer's.
    """
    kept = []
    with torch.no_grad():
        for parameter, master, layer in parameters:
            if (idle := idle_elements(parameter, layer, path, tensor_rank, tensor_size)) is not None:
                dim, elements = idle
                state = optimizer.state.get(master, {})
                tensors = [master.detach(), *(state[kind] for kind in state_kinds(state, master))]
                kept += [(tensor, dim, elements, tensor.index_select(dim, elements)) for tensor in tensors]
        yield
        for tensor, dim, elements, values in kept:
            tensor.index_copy_(dim, elements, values)


def idle_elements(
    parameter: nn.Parameter, layer: int, path: LayerPath, tensor_rank: int, tensor_size: int
) -> tuple[int, torch.Tensor] | None:
    """Return along which dimension, and where, this rank's part of a parameter is idle on a path; None if nowhere."""
    if path.parts is None or not hasattr(parameter, "parts"):
        return None
    kind, dim = parameter.parts  # type: ignore[attr-defined]
    here = path.parts.number // tensor_size
    size = parameter.shape[dim] // here
    active = getattr(path.parts, kind)[layer]
    idle = [part for part in range(here) if tensor_rank * here + part not in active]
    if not idle:
        return None
    return dim, pieces(without_waiting(torch.tensor(idle), parameter.device), size)
