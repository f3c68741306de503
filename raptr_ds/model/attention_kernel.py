"""Attention in Triton: each query sees a range of keys, dropout is the project's hash, no T x T tensor is in memory.

The kernels are flash attention's (Dao 2023): scores live in registers, block by block, and the backward pass computes
them again from the logarithm of each row's sum. What differs is which blocks are visited. A query sees a range of keys
whose bounds never decrease along the sequence (key_ranges.py), so that a block of queries visits one run of blocks of
keys: a few where some keys are hidden, then many without a mask, then a few again. The same holds for the queries that
see a block of keys.

Runs on CUDA, and on a CPU where Triton interprets its kernels (TRITON_INTERPRET=1), as the tests do. Triton's language
has no keyword for it: names in capitals are compile-time constants, and `bounds` are the borders of the three runs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from raptr_ds.model.key_ranges import KeyRanges
from raptr_ds.parallel.dropout import keep_threshold


_LOG2_E = math.log2(math.e)


@triton.jit
def _keeps(rows, columns, THRESHOLD: tl.constexpr):
    """Return which elements dropout keeps: the last step of the hash in parallel/dropout.py, on hashes that broadcast."""
    x = rows.to(tl.uint32, bitcast=True) ^ columns.to(tl.uint32, bitcast=True)
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    x = x ^ (x >> 16)
    return (x & 0x7FFFFFFF) < THRESHOLD


@triton.jit
def _load_rows(pointer, at, stride, length, D: tl.constexpr, WIDTH: tl.constexpr):
    """Return rows `at` (n,) of a (T, D) tensor as (n, WIDTH), zeros outside."""
    feature = tl.arange(0, WIDTH)
    inside = (at < length)[:, None] & (feature < D)[None, :]
    return tl.load(pointer + at[:, None] * stride + feature[None, :], mask=inside, other=0.0)


@triton.jit
def _store_rows(pointer, values, at, stride, length, D: tl.constexpr, WIDTH: tl.constexpr):
    """Store values (n, WIDTH) as rows `at` (n,) of a (T, D) tensor."""
    feature = tl.arange(0, WIDTH)
    inside = (at < length)[:, None] & (feature < D)[None, :]
    tl.store(pointer + at[:, None] * stride + feature[None, :], values.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _bounds(first, end, low, length, OWN: tl.constexpr, OTHER: tl.constexpr, RANGES: tl.constexpr):
    """Return the borders of the runs of blocks that the items from `low` on visit: hidden in part, whole, in part."""
    begin, whole, whole_end, stop = 0, 0, length // OTHER * OTHER, length
    if RANGES:
        last = tl.minimum(low + OWN, length) - 1
        begin = tl.load(first + low) // OTHER * OTHER
        whole = tl.cdiv(tl.load(first + last), OTHER) * OTHER
        whole_end = tl.maximum(whole, tl.load(end + low) // OTHER * OTHER)
        stop = tl.load(end + last)
    return begin, whole, whole_end, stop


@triton.jit
def _forward(
    query, key, value, output, logarithms, first_key, end_key, rows, columns,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    heads, length, scale, keep_scale,
    D: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    RANGES: tl.constexpr, THRESHOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend with one block of queries of one head; grid (blocks of queries, b * heads)."""
    low = tl.program_id(0) * QUERIES
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    first_key += batch * length
    end_key += batch * length
    at = low + tl.arange(0, QUERIES)
    inside = at < length
    queries = _load_rows(query + batch * query_batch + head * query_head, at, query_row, length, D, WIDTH)
    if RANGES:
        first = tl.load(first_key + at, mask=inside, other=0)
        end = tl.load(end_key + at, mask=inside, other=0)
    if THRESHOLD > 0:
        row_hashes = tl.load(rows + batch * length + at, mask=inside, other=0)
    mixed = tl.zeros((QUERIES, WIDTH), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    bounds = _bounds(first_key, end_key, low, length, QUERIES, KEYS, RANGES)
    for run in tl.static_range(0 if RANGES else 1, 3):
        for start in range(bounds[run], bounds[run + 1], KEYS):
            others = start + tl.arange(0, KEYS)
            keys = _load_rows(key, others, key_row, length, D, WIDTH)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
            if run != 1:
                if RANGES:
                    seen = (others[None, :] >= first[:, None]) & (others[None, :] < end[:, None])
                else:
                    seen = (others < length)[None, :]
                scores = tl.where(seen, scores, float("-inf"))
            larger = tl.maximum(largest, tl.max(scores, 1))
            offset = larger
            if run != 1:  # a row may have seen nothing so far
                offset = tl.where(larger == float("-inf"), 0.0, larger)
            weights = tl.exp2(scores - offset[:, None])
            shrink = tl.exp2(largest - offset)
            total = total * shrink + tl.sum(weights, 1)
            if THRESHOLD > 0:
                column_hashes = tl.load(columns + head * length + others, mask=others < length, other=0)
                weights = tl.where(_keeps(row_hashes[:, None], column_hashes[None, :], THRESHOLD), weights, 0.0)
            values = _load_rows(value, others, value_row, length, D, WIDTH)
            mixed = tl.dot(weights.to(values.dtype), values, mixed * shrink[:, None], input_precision=PRECISION)
            largest = larger
    mixed *= (keep_scale / total)[:, None]
    _store_rows(output + (batch * length * heads + head) * D, mixed, at, heads * D, length, D, WIDTH)
    tl.store(logarithms + (batch * heads + head) * length + at, largest + tl.log2(total), mask=inside)


@triton.jit
def _output_products(
    output, gradient, products, gradient_batch, gradient_head, gradient_row, heads, length,
    D: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Store the product of each query's output and its gradient; grid (blocks of queries, b * heads)."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    at = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    outputs = _load_rows(output + (batch * length * heads + head) * D, at, heads * D, length, D, WIDTH)
    gradients = _load_rows(gradient + batch * gradient_batch + head * gradient_head, at, gradient_row, length, D, WIDTH)
    sums = tl.sum(outputs.to(tl.float32) * gradients.to(tl.float32), 1)
    tl.store(products + (batch * heads + head) * length + at, sums, mask=at < length)


@triton.jit
def _backward_queries(
    query, key, value, gradient, logarithms, products, by_query, first_key, end_key, rows, columns,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    gradient_batch, gradient_head, gradient_row, heads, length, scale, factor, keep_scale,
    D: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    RANGES: tl.constexpr, THRESHOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store the gradient of one block of queries of one head; grid (blocks of queries, b * heads)."""
    low = tl.program_id(0) * QUERIES
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    first_key += batch * length
    end_key += batch * length
    at = low + tl.arange(0, QUERIES)
    inside = at < length
    queries = _load_rows(query + batch * query_batch + head * query_head, at, query_row, length, D, WIDTH)
    gradients = _load_rows(gradient + batch * gradient_batch + head * gradient_head, at, gradient_row, length, D, WIDTH)
    number = (batch * heads + head) * length
    logarithm = tl.load(logarithms + number + at, mask=inside, other=float("inf"))
    product = tl.load(products + number + at, mask=inside, other=0.0)
    if RANGES:
        first = tl.load(first_key + at, mask=inside, other=0)
        end = tl.load(end_key + at, mask=inside, other=0)
    if THRESHOLD > 0:
        row_hashes = tl.load(rows + batch * length + at, mask=inside, other=0)
    total = tl.zeros((QUERIES, WIDTH), tl.float32)
    bounds = _bounds(first_key, end_key, low, length, QUERIES, KEYS, RANGES)
    for run in tl.static_range(0 if RANGES else 1, 3):
        for start in range(bounds[run], bounds[run + 1], KEYS):
            others = start + tl.arange(0, KEYS)
            keys = _load_rows(key, others, key_row, length, D, WIDTH)
            values = _load_rows(value, others, value_row, length, D, WIDTH)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
            weights = tl.exp2(scores - logarithm[:, None])
            if run != 1:
                if RANGES:
                    seen = (others[None, :] >= first[:, None]) & (others[None, :] < end[:, None])
                else:
                    seen = (others < length)[None, :]
                weights = tl.where(seen, weights, 0.0)
            by_weight = tl.dot(gradients, tl.trans(values), input_precision=PRECISION)
            if THRESHOLD > 0:
                column_hashes = tl.load(columns + head * length + others, mask=others < length, other=0)
                keeps = _keeps(row_hashes[:, None], column_hashes[None, :], THRESHOLD)
                by_weight = tl.where(keeps, by_weight * keep_scale, 0.0)
            by_score = weights * (by_weight - product[:, None])
            total = tl.dot(by_score.to(keys.dtype), keys, total, input_precision=PRECISION)
    _store_rows(by_query + (batch * length * heads + head) * D, total * factor, at, heads * D, length, D, WIDTH)


@triton.jit
def _backward_keys(
    query, key, value, gradient, logarithms, products, by_key, by_value, first_query, end_query, rows, columns,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    gradient_batch, gradient_head, gradient_row, heads, length, scale, factor, keep_scale,
    D: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    RANGES: tl.constexpr, THRESHOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store the gradients of one block of keys and values of one head; grid (blocks of keys, b * heads).

    Scores are transposed here: (keys, queries).
    """
    low = tl.program_id(0) * KEYS
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    query += batch * query_batch + head * query_head
    gradient += batch * gradient_batch + head * gradient_head
    first_query += batch * length
    end_query += batch * length
    rows += batch * length
    number = (batch * heads + head) * length
    logarithms += number
    products += number
    at = low + tl.arange(0, KEYS)
    inside = at < length
    keys = _load_rows(key + batch * key_batch + head * key_head, at, key_row, length, D, WIDTH)
    values = _load_rows(value + batch * value_batch + head * value_head, at, value_row, length, D, WIDTH)
    if RANGES:
        first = tl.load(first_query + at, mask=inside, other=0)
        end = tl.load(end_query + at, mask=inside, other=0)
    if THRESHOLD > 0:
        column_hashes = tl.load(columns + head * length + at, mask=inside, other=0)
    key_total = tl.zeros((KEYS, WIDTH), tl.float32)
    value_total = tl.zeros((KEYS, WIDTH), tl.float32)
    bounds = _bounds(first_query, end_query, low, length, KEYS, QUERIES, RANGES)
    for run in tl.static_range(0 if RANGES else 1, 3):
        for start in range(bounds[run], bounds[run + 1], QUERIES):
            others = start + tl.arange(0, QUERIES)
            exists = others < length
            queries = _load_rows(query, others, query_row, length, D, WIDTH)
            gradients = _load_rows(gradient, others, gradient_row, length, D, WIDTH)
            logarithm = tl.load(logarithms + others, mask=exists, other=float("inf"))
            product = tl.load(products + others, mask=exists, other=0.0)
            scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale
            weights = tl.exp2(scores - logarithm[None, :])
            if run != 1 and RANGES:
                seen = (others[None, :] >= first[:, None]) & (others[None, :] < end[:, None])
                weights = tl.where(seen, weights, 0.0)
            kept = weights
            by_weight = tl.dot(values, tl.trans(gradients), input_precision=PRECISION)
            if THRESHOLD > 0:
                row_hashes = tl.load(rows + others, mask=exists, other=0)
                keeps = _keeps(row_hashes[None, :], column_hashes[:, None], THRESHOLD)
                kept = tl.where(keeps, weights * keep_scale, 0.0)
                by_weight = tl.where(keeps, by_weight * keep_scale, 0.0)
            value_total = tl.dot(kept.to(gradients.dtype), gradients, value_total, input_precision=PRECISION)
            by_score = weights * (by_weight - product[None, :])
            key_total = tl.dot(by_score.to(queries.dtype), queries, key_total, input_precision=PRECISION)
    place = (batch * length * heads + head) * D
    _store_rows(by_key + place, key_total * factor, at, heads * D, length, D, WIDTH)
    _store_rows(by_value + place, value_total, at, heads * D, length, D, WIDTH)


@dataclass(frozen=True)
class _Blocks:
    """Queries and keys of a block, and Triton's number of warps and of loads under way."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


def _forward_blocks(width: int, itemsize: int) -> _Blocks:
    if itemsize > 2:
        return _Blocks(64, 32, 4, 2)
    return _Blocks(128, 64, 4, 3) if width <= 64 else _Blocks(128, 64, 8, 3) if width <= 128 else _Blocks(64, 32, 4, 2)


def _backward_blocks(width: int, itemsize: int) -> tuple[_Blocks, _Blocks]:
    """Return the blocks of the kernel for the queries' gradient and of that for the keys' and values'."""
    if itemsize > 2:
        return _Blocks(32, 32, 4, 1), _Blocks(32, 32, 4, 1)
    if width <= 64:
        return _Blocks(128, 64, 4, 3), _Blocks(64, 128, 4, 3)
    return (_Blocks(128, 64, 8, 2), _Blocks(64, 128, 8, 2)) if width <= 128 else (_Blocks(64, 32, 4, 1),) * 2


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
    _forward[(triton.cdiv(length, blocks.queries), batch * heads)](
        query, key, value, output, logarithms, first, end, rows, columns,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], heads, length, size**-0.5 * _LOG2_E,
        1.0 / (1.0 - rate), QUERIES=blocks.queries, KEYS=blocks.keys, num_warps=blocks.num_warps,
        num_stages=blocks.num_stages, **constants,
    )  # fmt: skip
    return output, logarithms


@_attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ranges: Sequence[torch.Tensor],
    hashes: Sequence[torch.Tensor],
    rate: float,
) -> tuple[torch.Tensor, torch.Tensor]:
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
    for_queries, for_keys = _backward_blocks(constants["WIDTH"], query.element_size())
    first_key, end_key, first_query, end_query = ranges or (logarithms,) * 4
    rows, columns = hashes or (logarithms, logarithms)
    strides = [stride for x in (query, key, value, gradient) for stride in x.stride()[:3]]
    scale = size**-0.5
    numbers = (*strides, heads, length, scale * _LOG2_E, scale, 1.0 / (1.0 - rate))
    inputs = (query, key, value, gradient, logarithms, products)
    blocks = for_queries
    grid = triton.cdiv(length, blocks.queries), batch * heads
    _output_products[grid](
        output, gradient, products, *gradient.stride()[:3], heads, length,
        D=size, WIDTH=constants["WIDTH"], QUERIES=blocks.queries,
    )  # fmt: skip
    _backward_queries[grid](
        *inputs, by_query, first_key, end_key, rows, columns, *numbers, QUERIES=blocks.queries, KEYS=blocks.keys,
        num_warps=blocks.num_warps, num_stages=blocks.num_stages, **constants,
    )  # fmt: skip
    blocks = for_keys
    _backward_keys[(triton.cdiv(length, blocks.keys), batch * heads)](
        *inputs, by_key, by_value, first_query, end_query, rows, columns, *numbers, QUERIES=blocks.queries,
        KEYS=blocks.keys, num_warps=blocks.num_warps, num_stages=blocks.num_stages, **constants,
    )  # fmt: skip
    return by_query.transpose(1, 2), by_key.transpose(1, 2), by_value.transpose(1, 2)


@_attention_backward.register_fake
def _(
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
