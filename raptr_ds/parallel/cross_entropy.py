"""Cross-entropy over a vocabulary that may be split over tensor ranks: one buffer of logits, reused for everything.

Plain torch holds logits, log-probabilities, the gradient of each and, below fp32, their fp32 copies. Here the logits
become their exponentials where they stand, in pieces that stay in a core's cache, and these become the logits' gradient
in the backward pass. On GPUs two kernels do the same in one pass each (cross_entropy_kernel.py). The arithmetic is the
same, to rounding.
"""

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.parallel.megatron_core import copy_to_tensor_model_parallel_region
from raptr_ds.parallel.triton_check import triton_obstacle

# On a CPU a piece of logits stays in a core's second-level cache; elsewhere it bounds the fp32 copies.
_CPU_PIECE_ELEMENTS = 1 << 18
_PIECE_ELEMENTS = 1 << 26
# On a GPU each row of logits begins at a multiple of so many: an odd vocabulary would keep the matrix products (three
# read or write logits) and the kernels from wide loads.
_ALIGNED = 64


def cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    vocab_size: int,
    groups: ProcessGroups,
) -> torch.Tensor:
    """Return each position's cross-entropy over the whole vocabulary, fp32 (fp64 for an fp64 model).

    Shapes: hidden (N, H), the same on every tensor rank; weight (rows, H) and bias (rows,), this rank's rows of the
    vocabulary, those beyond vocab_size being padding that takes no part; targets (N,) global ids; returns (N,).
    """
    if groups.topology.tensor > 1:
        hidden = copy_to_tensor_model_parallel_region(hidden, groups.tensor)  # whose backward pass sums over the ranks
    first_row = groups.tensor_rank * len(weight)
    real_rows = max(0, min(len(weight), vocab_size - first_row))
    local = targets - first_row
    local = torch.where((local >= 0) & (local < real_rows), local, -1)  # -1: another rank has it
    return _CrossEntropy.apply(hidden, weight, bias, local, real_rows, groups.tensor)


class _CrossEntropy(torch.autograd.Function):
    """Saves the logits, or their exponentials; its backward pass overwrites them, so it runs once."""

    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        local: torch.Tensor,
        real_rows: int,
        group: dist.ProcessGroup,
    ) -> torch.Tensor:
        ctx.by_kernel, ctx.has_bias, ctx.real_rows = _has_kernel(hidden, group), bias is not None, real_rows
        rows = None
        if ctx.by_kernel:
            rows = hidden.new_empty(len(hidden), -(-len(weight) // _ALIGNED) * _ALIGNED)[:, : len(weight)]
        if bias is None:
            ctx.logits = torch.mm(hidden, weight.t(), out=rows)
        else:
            ctx.logits = torch.addmm(bias, hidden, weight.t(), out=rows)
        losses_of = _losses_by_kernel if ctx.by_kernel else _losses_in_pieces
        losses, statistics = losses_of(ctx.logits, local, real_rows, group)
        ctx.save_for_backward(hidden, weight, local, statistics)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore
        hidden, weight, local, statistics = ctx.saved_tensors
        by_logits, ctx.logits = ctx.logits, None
        assert by_logits is not None, "the backward pass of a cross-entropy runs once"
        if ctx.by_kernel:
            from raptr_ds.parallel.cross_entropy_kernel import overwrite_by_gradient

            overwrite_by_gradient(by_logits, local, statistics, gradients[0].contiguous(), ctx.real_rows)
        else:
            _to_gradient(by_logits, local, statistics, gradients[0])
        by_bias = by_logits.sum(0) if ctx.has_bias else None
        return by_logits @ weight, by_logits.t() @ hidden, by_bias, None, None, None


def _losses_by_kernel(
    logits: torch.Tensor, local: torch.Tensor, real_rows: int, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses of logits (n, rows), and the logarithms of the sums of their exponentials, both (n,)."""
    from raptr_ds.parallel.cross_entropy_kernel import statistics_of  # Triton is not there on every machine

    statistics = statistics_of(logits, local, real_rows)
    if group.size() > 1:
        largest = statistics[0].clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        statistics[1] *= (statistics[0] - largest).exp()
        statistics[0] = largest
        dist.all_reduce(statistics[1:], group=group)
    logarithms = statistics[0] + statistics[1].log()
    return logarithms - statistics[2], logarithms


def _losses_in_pieces(
    logits: torch.Tensor, local: torch.Tensor, real_rows: int, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn logits (n, rows) into exp(logit - the largest) in place.

    Returns the losses (n,), and (2, n): the sums of all exponentials, and the targets' logits less the largest.
    """
    logits[:, real_rows:] = -torch.inf
    largest = logits.amax(1)
    if group.size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    is_here, local = local >= 0, local.clamp(min=0)
    sums = torch.empty(2, len(logits), dtype=at_least_fp32(largest).dtype, device=logits.device)
    piece = _CPU_PIECE_ELEMENTS if logits.device.type == "cpu" else _PIECE_ELEMENTS
    for start in range(0, len(logits), max(1, piece // logits.shape[1])):
        here = slice(start, start + max(1, piece // logits.shape[1]))
        working = at_least_fp32(logits[here])  # the same memory in fp32 and fp64
        working -= largest[here, None]
        sums[1, here] = torch.where(is_here[here], working.gather(1, local[here, None])[:, 0], 0.0)
        torch.sum(working.exp_(), 1, out=sums[0, here])
        if working.dtype != logits.dtype:
            logits[here] = working
    if group.size() > 1:
        dist.all_reduce(sums, group=group)
    return sums[0].log() - sums[1], sums


def _to_gradient(exponentials: torch.Tensor, local: torch.Tensor, sums: torch.Tensor, by_loss: torch.Tensor) -> None:
    """Turn the exponentials that `_losses_in_pieces` left into the logits' gradient, in place; sums: what it gave."""
    is_here, local = local >= 0, local.clamp(min=0)[:, None]
    total, of_target = sums
    scale = by_loss / total
    exponentials.mul_(scale.to(exponentials.dtype)[:, None])
    # In fp32 from its parts: a probability near one, rounded to bf16, would leave nothing of the difference to one.
    at_target = (scale * of_target.exp() - by_loss).to(exponentials.dtype)
    elsewhere = exponentials.gather(1, local)
    exponentials.scatter_(1, local, torch.where(is_here[:, None], at_target[:, None], elsewhere))


def _has_kernel(hidden: torch.Tensor, group: dist.ProcessGroup) -> bool:
    return hidden.is_cuda and hidden.dtype != torch.float64 and all_have_triton(group, hidden.device)


@cache
def all_have_triton(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Return whether Triton runs kernels on every rank of a group. Its first call is collective.

    The two forms reduce different numbers over the ranks that share a vocabulary, so all of these take the same one.
    """
    runs = triton_obstacle() is None
    if group.size() == 1:
        return runs
    everywhere = torch.tensor(float(runs), device=device)
    dist.all_reduce(everywhere, op=dist.ReduceOp.MIN, group=group)
    return bool(everywhere)


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """Return x in fp32, or as it is where it is fp64 (tests compare formulas there)."""
    return x if x.dtype == torch.float64 else x.float()
