"""The product of a column linear, of one matrix or of two whose rows take turns, and its exchange with other ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.nn import functional

from raptr_ds.parallel.sequence import start_gather, start_sum, start_sum_of_part


def column_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    num_parts: int = 1,
    group: dist.ProcessGroup | None = None,
    along_sequence: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Return x times the weight's rows n, n + num_parts, n + 2 * num_parts and so on, for each part n.

    Shapes: x (b, T, in), with along_sequence (b, T / ranks, in), this rank's part; weight (out, in); returns num_parts
    tensors (b, T, out / num_parts). group: of the tensor ranks, over which x's gradient is summed; None for one rank.
    """
    return _ColumnProduct.apply(x, weight, num_parts, group, along_sequence)


class _ColumnProduct(torch.autograd.Function):
    """Written by hand for two reasons.

    The weight's gradient is computed while x's is summed over the ranks; and what was gathered of x is not kept, but
    gathered again while x's gradient is computed (as Megatron does).

    And the backward pass keeps the weight itself: slices of it would hold the gathered copy alive that ZeRO 3 wants to
    release, and their gradients would be padded with zeros and added.
    """

    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        num_parts: int,
        group: dist.ProcessGroup | None,
        along_sequence: bool,
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(x, weight)
        ctx.num_parts, ctx.group, ctx.along_sequence = num_parts, group, along_sequence
        if group is not None and along_sequence:
            x = start_gather(x, group).take()
        return tuple(functional.linear(x, weight[part::num_parts]) for part in range(num_parts))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore
        x, weight = ctx.saved_tensors
        group, along_sequence, num_parts = ctx.group, ctx.along_sequence, ctx.num_parts
        gathering = start_gather(x, group) if along_sequence else None
        parts = [gradient.flatten(0, -2) for gradient in gradients]
        by_x = parts[0] @ weight[0::num_parts]
        for part in range(1, num_parts):
            by_x.addmm_(parts[part], weight[part::num_parts])
        by_x = by_x.unflatten(0, gradients[0].shape[:-1])
        summing = None
        if group is not None:
            summing = start_sum_of_part(by_x, group) if along_sequence else start_sum(by_x, group)
        rows = (x if gathering is None else gathering.take()).flatten(0, -2)
        by_parts = [part.t() @ rows for part in parts]
        by_weight = by_parts[0] if num_parts == 1 else torch.stack(by_parts, dim=1).flatten(0, 1)
        return by_x if summing is None else summing.take(), by_weight, None, None, None


def reads_rows_apart(device: torch.device) -> bool:
    """Whether a weight with the rows of two matrices in turns is multiplied as two, with a row stride, or as one.

    On a CPU two: taking the outputs of one apart is a strided pass over each of them, which costs more than the rest of
    the activation. On a GPU one: half as many products, each twice as large, x and its gradient in one go, and a
    compiled block takes the outputs apart in the kernel that multiplies them, and puts the gradients together likewise.
    """
    return device.type == "cpu"
