"""Triton kernels of the cross-entropy: logits are read once for their loss, and read and overwritten once for its
gradient, in place of about ten passes over them.

Run on CUDA, and on a CPU where Triton interprets its kernels (TRITON_INTERPRET=1), as the tests do.
"""

from typing import Any

import torch
import triton
import triton.language as tl

_BLOCK = 4096


@triton.jit
def cross_entropy_statistics(logits, targets, largest, sums, of_target, stride, real_rows, BLOCK: tl.constexpr):
    """Store each position's largest logit, the sum of exp(logit - largest), and its target's logit; grid (N,).

    targets: this rank's row of the target, -1 where another rank has it, whose logit counts as 0.
    """
    position = tl.program_id(0)
    logits += position.to(tl.int64) * stride
    high = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, real_rows, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(logits + at, mask=at < real_rows, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(high, values)
        offset = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(high - offset) + tl.exp(values - offset)
        high = higher
    top = tl.max(high, 0)
    tl.store(largest + position, top)
    offset = tl.where(top == float("-inf"), 0.0, top)  # a rank of padding alone has the sum 0
    tl.store(sums + position, tl.sum(total * tl.exp(high - offset), 0))
    target = tl.load(targets + position)
    tl.store(of_target + position, tl.load(logits + target, mask=target >= 0, other=0.0).to(tl.float32))


@triton.jit
def cross_entropy_gradient(logits, targets, logarithms, scales, stride, real_rows, BLOCK: tl.constexpr):
    """Overwrite logits by the gradient of scale * (log of the sum - target's logit), padding by 0; grid (N,)."""
    position = tl.program_id(0)
    logits += position.to(tl.int64) * stride
    target = tl.load(targets + position)
    logarithm = tl.load(logarithms + position)
    scale = tl.load(scales + position)
    for start in range(0, stride, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(logits + at, mask=at < real_rows, other=float("-inf")).to(tl.float32)
        probabilities = tl.exp(values - logarithm)
        gradient = (probabilities - (at == target).to(tl.float32)) * scale
        tl.store(logits + at, gradient.to(logits.dtype.element_ty), mask=at < stride)


def statistics_of(logits: torch.Tensor, targets: torch.Tensor, real_rows: int) -> torch.Tensor:
    """Return (3, N) fp32: each position's largest logit, sum of exp(logit - largest), target's logit (0 elsewhere).

    Shapes: logits (N, rows); targets (N,), rows of logits, -1 for those of other ranks. Units: real_rows, the rows
    that are not padding.
    """
    found = torch.empty(3, len(logits), dtype=torch.float32, device=logits.device)
    kernel: Any = cross_entropy_statistics
    if len(logits):
        kernel[(len(logits),)](logits, targets, *found, logits.stride(0), real_rows, BLOCK=_BLOCK, num_warps=8)
    return found


def overwrite_by_gradient(
    logits: torch.Tensor, targets: torch.Tensor, logarithms: torch.Tensor, scales: torch.Tensor, real_rows: int
) -> None:
    """Make logits (N, rows) their gradient, in place; logarithms, scales (N,) fp32: of the whole sum, of the loss.

    What lies between the rows in memory becomes 0: matrix products may read a few elements more than they use (oneDNN's
    in bf16 do), and NaN times 0 is NaN.
    """
    kernel: Any = cross_entropy_gradient
    if len(logits):
        kernel[(len(logits),)](
            logits, targets, logarithms, scales, logits.stride(0), real_rows, BLOCK=_BLOCK, num_warps=8
        )
