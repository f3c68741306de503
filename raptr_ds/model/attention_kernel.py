"""Triton kernels of attention: each query sees a range of keys, dropout is the project's hash.

They are flash attention's (Dao 2023): scores live in registers, block by block, and the backward pass computes them
again from the logarithm of each row's sum. What differs is which blocks are visited. A query sees a range of keys
whose bounds never decrease along the sequence (key_ranges.py), so that a block of queries visits one run of blocks of
keys: a few where some keys are hidden, then many without a mask, then a few again. The same holds for the queries that
see a block of keys.

Names in capitals are compile-time constants: D features of a head in a register row of WIDTH, RANGES whether there are
any, THRESHOLD dropout's or 0. `bounds` are the borders of the three runs.
"""

import triton
import triton.language as tl


@triton.jit
def _keeps(rows, columns, THRESHOLD: tl.constexpr):
    """Return which elements dropout keeps, the last step of parallel/dropout.py's hash, for hashes that broadcast."""
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
def attention_forward(
    query, key, value, output, logarithms, first_key, end_key, rows, columns,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    heads, length, scale, keep_scale,
    D: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    RANGES: tl.constexpr, THRESHOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend with one block of queries of one head; grid (blocks of queries, heads, b)."""
    low = tl.program_id(0) * QUERIES
    batch, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
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
def attention_output_products(
    output, gradient, products, gradient_batch, gradient_head, gradient_row, heads, length,
    D: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Store the product of each query's output and its gradient; grid (blocks of queries, heads, b)."""
    batch, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
    at = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    outputs = _load_rows(output + (batch * length * heads + head) * D, at, heads * D, length, D, WIDTH)
    gradients = _load_rows(gradient + batch * gradient_batch + head * gradient_head, at, gradient_row, length, D, WIDTH)
    sums = tl.sum(outputs.to(tl.float32) * gradients.to(tl.float32), 1)
    tl.store(products + (batch * heads + head) * length + at, sums, mask=at < length)


@triton.jit
def attention_backward_queries(
    query, key, value, gradient, logarithms, products, by_query, first_key, end_key, rows, columns,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    gradient_batch, gradient_head, gradient_row, heads, length, scale, factor, keep_scale,
    D: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    RANGES: tl.constexpr, THRESHOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store the gradient of one block of queries of one head; grid (blocks of queries, heads, b)."""
    low = tl.program_id(0) * QUERIES
    batch, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
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
def attention_backward_keys(
    query, key, value, gradient, logarithms, products, by_key, by_value, first_query, end_query, rows, columns,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    gradient_batch, gradient_head, gradient_row, heads, length, scale, factor, keep_scale,
    D: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    RANGES: tl.constexpr, THRESHOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store the gradients of one block of keys and values of one head; grid (blocks of keys, heads, b).

    Scores are transposed here: (keys, queries).
    """
    low = tl.program_id(0) * KEYS
    batch, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
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
