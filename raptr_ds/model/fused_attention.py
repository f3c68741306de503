"""Attention as one operation of our own kernels, forward and backward: no T x T tensor is ever in memory.

Runs on CUDA, and on a CPU where Triton interprets its kernels (TRITON_INTERPRET=1), as the tests do. Compilers see it
as one operation that they leave alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

from raptr_ds.model import attention_kernel
from raptr_ds.model.key_ranges import KeyRanges
from raptr_ds.parallel.dropout import keep_threshold

_LOG2_E = math.log2(math.e)
_KERNELS: Any = attention_kernel  # Triton's launches have more arguments than the functions


@dataclass(frozen=True)
class _Blocks:
    """Queries and keys of a block, Triton's warps of a block and loads under way.

    Chosen by the width of a head so that Hopper's compiler keeps everything in registers (tests/hopper.py compiles for
    it without a GPU).
    """

    queries: int
    keys: int
    num_warps: int = 8
    num_stages: int = 3


def _forward_blocks(width: int, itemsize: int) -> _Blocks:
    if itemsize > 2:
        return _Blocks(64, 32, num_stages=2)
    return _Blocks(128, 64) if width <= 128 else _Blocks(64, 32, num_stages=2)


def _query_blocks(width: int, itemsize: int) -> _Blocks:
    if itemsize > 2:
        return _Blocks(32, 32, 4, 1)
    return _Blocks(128, 64, num_stages=2) if width <= 128 else _Blocks(64, 32, num_stages=1)


def _key_blocks(width: int, itemsize: int) -> _Blocks:
    if itemsize > 2:
        return _Blocks(32, 32, 4, 1)
    return _Blocks(32, 128) if width <= 128 else _Blocks(32, 64, num_stages=1)


def fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ranges: KeyRanges | None,
    hashes: tuple[torch.Tensor, torch.Tensor] | None = None,
    rate: float = 0.0,
) -> torch.Tensor:
    """Return softmax(query key^T / sqrt(D)) value over the keys that each query sees, with dropout of the weights.

    Shapes: query, key, value (b, heads, T, D), D at most 256; hashes (b, T) and (heads, T) int32, those of the rows and
    columns of the weights (LayerDropout.row_and_column_hashes), None for no dropout; returns (b, T, heads, D).
    """
    return torch.ops.raptr_ds.attention(query, key, value, list(ranges or ()), list(hashes or ()), rate)[0]


@torch.library.custom_op("raptr_ds::attention", mutates_args=())
def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ranges: Sequence[torch.Tensor],
    hashes: Sequence[torch.Tensor],
    rate: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, length, size = query.shape
    query, key, value = (_with_dense_rows(x) for x in (query, key, value))
    output = torch.empty(batch, length, heads, size, dtype=query.dtype, device=query.device)
    logarithms = torch.empty(batch, heads, length, dtype=torch.float32, device=query.device)
    constants = _constants(query, ranges, hashes, rate)
    blocks = _forward_blocks(constants["WIDTH"], query.element_size())
    first, end = (ranges[0], ranges[1]) if ranges else (logarithms, logarithms)
    rows, columns = hashes or (logarithms, logarithms)
    _KERNELS.attention_forward[(triton.cdiv(length, blocks.queries), heads, batch)](
        query, key, value, output, logarithms, first, end, rows, columns,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], heads, length, size**-0.5 * _LOG2_E,
        1.0 / (1.0 - rate), QUERIES=blocks.queries, KEYS=blocks.keys, num_warps=blocks.num_warps,
        num_stages=blocks.num_stages, **constants,
    )  # fmt: skip
    return output, logarithms


@_attention.register_fake
def _(query: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, length, size = query.shape
    return query.new_empty(batch, length, heads, size), query.new_empty(batch, heads, length, dtype=torch.float32)


@torch.library.custom_op("raptr_ds::attention_backward", mutates_args=())
def _attention_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    logarithms: torch.Tensor,
    ranges: Sequence[torch.Tensor],
    hashes: Sequence[torch.Tensor],
    rate: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, heads, length, size = query.shape
    query, key, value, gradient = (_with_dense_rows(x) for x in (query, key, value, gradient.transpose(1, 2)))
    by_query, by_key, by_value = (torch.empty_like(output) for _ in range(3))
    products = torch.empty_like(logarithms)
    constants = _constants(query, ranges, hashes, rate)
    first_key, end_key, first_query, end_query = ranges or (logarithms,) * 4
    rows, columns = hashes or (logarithms, logarithms)
    strides = [stride for x in (query, key, value, gradient) for stride in x.stride()[:3]]
    scale = size**-0.5
    numbers = (*strides, heads, length, scale * _LOG2_E, scale, 1.0 / (1.0 - rate))
    inputs = (query, key, value, gradient, logarithms, products)
    blocks = _query_blocks(constants["WIDTH"], query.element_size())
    grid = triton.cdiv(length, blocks.queries), heads, batch
    _KERNELS.attention_output_products[grid](
        output, gradient, products, *gradient.stride()[:3], heads, length,
        D=size, WIDTH=constants["WIDTH"], QUERIES=blocks.queries,
    )  # fmt: skip
    _KERNELS.attention_backward_queries[grid](
        *inputs, by_query, first_key, end_key, rows, columns, *numbers, QUERIES=blocks.queries, KEYS=blocks.keys,
        num_warps=blocks.num_warps, num_stages=blocks.num_stages, **constants,
    )  # fmt: skip
    blocks = _key_blocks(constants["WIDTH"], query.element_size())
    _KERNELS.attention_backward_keys[(triton.cdiv(length, blocks.keys), heads, batch)](
        *inputs, by_key, by_value, first_query, end_query, rows, columns, *numbers, QUERIES=blocks.queries,
        KEYS=blocks.keys, num_warps=blocks.num_warps, num_stages=blocks.num_stages, **constants,
    )  # fmt: skip
    return by_query.transpose(1, 2), by_key.transpose(1, 2), by_value.transpose(1, 2)


@_attention_backward.register_fake
def _(_gradient: torch.Tensor, query: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, heads, length, size = query.shape
    by_query, by_key, by_value = (query.new_empty(batch, length, heads, size).transpose(1, 2) for _ in range(3))
    return by_query, by_key, by_value


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, ranges, hashes, ctx.rate = inputs
    ctx.num_ranges = len(ranges)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output, *ranges, *hashes)


def _differentiate(ctx: Any, gradient: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
    query, key, value, output, logarithms, *rest = ctx.saved_tensors
    ranges, hashes = rest[: ctx.num_ranges], rest[ctx.num_ranges :]
    found = torch.ops.raptr_ds.attention_backward(
        gradient, query, key, value, output, logarithms, ranges, hashes, ctx.rate
    )
    return *found, [None] * len(ranges), [None] * len(hashes), None


_attention.register_autograd(_differentiate, setup_context=_keep_for_backward)


def _with_dense_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _constants(
    query: torch.Tensor, ranges: Sequence[torch.Tensor], hashes: Sequence[torch.Tensor], rate: float
) -> dict[str, Any]:
    """Return the constants that all kernels share."""
    is_exact = query.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return {
        "D": query.shape[-1],
        "WIDTH": max(16, triton.next_power_of_2(query.shape[-1])),
        "RANGES": bool(ranges),
        "THRESHOLD": keep_threshold(rate) if hashes else 0,
        "PRECISION": "ieee" if is_exact else "tf32",
    }
