"""Sequence parallelism: the residual stream split along the sequence over the tensor ranks, and what they exchange.

A rank has the positions from `tensor_rank * T / tensor` on of every sequence, (b, T / tensor, H), wherever the model
works position by position; the matrices see whole sequences. megatron-core's own functions for this call torch.cuda
on a CPU and want the sequence as the first dim.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable

from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.parallel.megatron_core import reduce_from_tensor_model_parallel_region

# torch 2.13 renames both, and warns of the names that older ones have.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Arriving:
    """A tensor that is under way between ranks; has_parts: as the ranks' parts of sequences, (ranks, b, t, H)."""

    def __init__(self, work: Any, tensor: torch.Tensor, has_parts: bool = False) -> None:
        self._work, self._tensor, self._has_parts = work, tensor, has_parts

    def take(self) -> torch.Tensor:
        """Return the tensor, once it is there: on a GPU later kernels wait for it, the host does not.

        Parts are put together to (b, T, H): a view where there is one sequence, a copy of several.
        """
        self._work.wait()
        return self._tensor.transpose(0, 1).flatten(1, 2) if self._has_parts else self._tensor


def start_sum(x: torch.Tensor, group: dist.ProcessGroup) -> Arriving:
    """Start to sum x over the ranks, in place."""
    return Arriving(dist.all_reduce(x, group=group, async_op=True), x)


def start_gather(x: torch.Tensor, group: dist.ProcessGroup) -> Arriving:
    """Start to put the ranks' parts (b, t, H) together to whole sequences."""
    parts = x.new_empty(group.size(), *x.shape)
    return Arriving(_all_gather(parts.flatten(0, 1), x.contiguous(), group=group, async_op=True), parts, True)


def start_sum_of_part(x: torch.Tensor, group: dist.ProcessGroup) -> Arriving:
    """Start to sum x (b, T, H) over the ranks, each of which gets its part of the sequences, (b, T / ranks, H)."""
    parts = x.unflatten(1, (group.size(), -1)).transpose(0, 1).contiguous()
    part = torch.empty_like(parts[0])
    return Arriving(_reduce_scatter(part, parts.flatten(0, 1), group=group, async_op=True), part)


def sum_over_ranks(
    x: torch.Tensor, bias: torch.Tensor | None, group: dist.ProcessGroup, along_sequence: bool
) -> torch.Tensor:
    """Return the sum over the tensor ranks plus the bias, or with along_sequence this rank's part of it.

    Shapes: x (b, T, H), bias (H,); returns (b, T, H) or (b, T / ranks, H). Gradients are those of whole sequences.
    """
    if along_sequence:
        return _SumOfPart.apply(x, bias, group)
    x = reduce_from_tensor_model_parallel_region(x, group)
    return x if bias is None else x + bias


class _SumOfPart(torch.autograd.Function):
    """The bias is in it because the backward pass has its whole gradient at hand."""

    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.group, ctx.has_bias = group, bias is not None
        part = start_sum_of_part(x, group).take()
        return part if bias is None else part.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore
        whole = start_gather(gradients[0], ctx.group).take()
        return whole, whole.sum((0, 1)) if ctx.has_bias else None, None


def pick_positions(x: torch.Tensor, positions: torch.Tensor, groups: ProcessGroups) -> torch.Tensor:
    """Return the stream at some positions of the whole sequences, the same on every tensor rank.

    Shapes: x (b, T, H), or this rank's part of it; positions (N,) int64, flat indices into b * T; returns (N, H). The
    gradient must be the same on every rank too.
    """
    if not groups.sequence_parallel:
        return x.flatten(0, 1).index_select(0, positions)
    part, ranks = x.shape[1], groups.topology.tensor
    sample, position = positions // (part * ranks), positions % (part * ranks)
    here = position - groups.sequence_rank * part
    is_elsewhere = (here < 0) | (here >= part)
    rows = x.flatten(0, 1).index_select(0, sample * part + here.clamp(0, part - 1))
    return reduce_from_tensor_model_parallel_region(rows.masked_fill(is_elsewhere[:, None], 0.0), groups.tensor)


def sum_gradients(module: nn.Module, groups: ProcessGroups) -> None:
    """Sum over the tensor ranks the gradients of a module that each runs on its part of the sequences.

    In a hook that autograd calls before it accumulates a gradient: so no engine, at no ZeRO stage, ever sees a part of
    one. The price is a small all-reduce for each parameter and micro batch.
    """
    if groups.sequence_parallel:
        for parameter in module.parameters():
            parameter.register_hook(lambda gradient: start_sum(gradient.clone(), groups.tensor).take())
