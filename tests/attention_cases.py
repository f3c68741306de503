"""Attention on the shapes that break kernels, against attention spelled out in fp64: values and gradients.

Interpreted on the CPU (tests/unit/model/test_fused_attention.py) and on a GPU (tests/gpu/test_attention.py).
"""

from dataclasses import dataclass

import torch

from raptr_ds.model.fused_attention import fused_attention
from raptr_ds.model.key_ranges import KeyRanges
from raptr_ds.parallel.dropout import LayerDropout, attention_hashes, attention_keep_mask
from raptr_ds.rng import stream
from tests.dropout_masks import streams_of

BATCH, HEADS, RATE = 2, 3, 0.1
GLOBAL_HEADS = (4, 5, 7)


@dataclass(frozen=True)
class Case:
    """Attention over `length` positions by heads of `size`, with dropout at `rate`; ranges None: all see all."""

    name: str
    length: int
    size: int
    ranges: KeyRanges | None
    rate: float

    def __str__(self) -> str:
        return f"{self.name}-{self.length}-{self.size}"


def ranges_of(first: torch.Tensor, end: torch.Tensor) -> KeyRanges:
    position = torch.arange(first.shape[1]).expand(first.shape).contiguous()
    queries = torch.searchsorted(end, position, right=True), torch.searchsorted(first, position, right=True)
    return KeyRanges(*(bound.int() for bound in (first, end, *queries)))


def prefixes(length: int, prefix: int) -> KeyRanges:
    position = torch.arange(length)
    end = torch.maximum(position + 1, torch.tensor([[prefix], [min(length, prefix + 17)]]))
    return ranges_of(torch.zeros_like(end), end)


def packed(length: int) -> KeyRanges:
    first, end = torch.zeros(BATCH, length, dtype=torch.long), torch.zeros(BATCH, length, dtype=torch.long)
    rng = stream(1, "packed", length)
    for row in range(BATCH):
        start = 0
        while start < length:
            size = min(length - start, int(rng.integers(1, 60)))
            query = torch.arange(start, start + size)
            first[row, query] = start
            end[row, query] = torch.maximum(query + 1, torch.tensor(start + int(rng.integers(0, size + 1))))
            start += size
    return ranges_of(first, end)


def causal(length: int) -> KeyRanges:
    end = torch.arange(1, length + 1)[None]
    return ranges_of(torch.zeros_like(end), end)


def spelled_out(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ranges: KeyRanges | None, rate: float
) -> torch.Tensor:
    length = query.shape[2]
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if ranges is not None:
        at = torch.arange(length, device=query.device)
        seen = (at >= ranges.first_key[..., None]) & (at < ranges.end_key[..., None])
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
    weights = scores.softmax(-1)
    if rate:
        heads = torch.tensor(GLOBAL_HEADS, device=query.device)
        keep = attention_keep_mask(rate, layer_dropout(query.device), length, heads=heads)
        weights = torch.where(keep, weights / (1.0 - rate), 0.0)
    return (weights @ value).transpose(1, 2)


# An odd length, one below and above a block, a remainder of 64 by 128 (which other kernels got wrong), very few tokens.
CASES = [
    Case("whole", 192, 64, None, 0.0),
    Case("whole", 33, 24, None, RATE),
    Case("prefix", 192, 64, prefixes(192, 70), 0.0),
    Case("prefix, dropout", 130, 32, prefixes(130, 65), RATE),
    Case("empty prefix", 127, 64, prefixes(127, 0), RATE),
    Case("all prefix", 64, 32, prefixes(64, 64), 0.0),
    Case("packed", 257, 32, packed(257), 0.0),
    Case("packed, dropout", 192, 64, packed(192), RATE),
    Case("wide heads", 70, 128, packed(70), RATE),
    Case("odd heads", 40, 96, prefixes(40, 3), RATE),
    Case("three tokens", 3, 16, prefixes(3, 0), RATE),
]


def layer_dropout(device: torch.device) -> LayerDropout:
    return streams_of(7, 3, torch.tensor([5, 90], device=device)).of_layer(2)


def errors_of(case: Case, dtype: torch.dtype, device: torch.device) -> list[float]:
    """Return the relative errors of the output and of the gradients of query, key and value."""
    generator = torch.Generator().manual_seed(case.length)
    together = torch.randn(BATCH, case.length, HEADS, 3, case.size, generator=generator).to(device, dtype)
    parts = together.permute(3, 0, 2, 1, 4).unbind(0)  # strided, as the model's
    query, key, value = given = [part.requires_grad_() for part in parts]
    ranges = None if case.ranges is None else KeyRanges(*(bound.to(device) for bound in case.ranges))
    heads = torch.tensor(GLOBAL_HEADS, device=device)
    hashes = attention_hashes(layer_dropout(device), case.length, heads=heads) if case.rate else None
    output = fused_attention(query, key, value, ranges, hashes, case.rate)
    assert output.dtype == dtype
    weight = torch.randn(output.shape, generator=generator).to(device, dtype)
    gradients = torch.autograd.grad(output, given, weight)
    wide_query, wide_key, wide_value = exact = [part.detach().double().requires_grad_() for part in given]
    expected = spelled_out(wide_query, wide_key, wide_value, ranges, case.rate)
    oracles = torch.autograd.grad(expected, exact, weight.double())
    errors = []
    for found, oracle in zip((output, *gradients), (expected, *oracles), strict=True):
        assert found.shape == oracle.shape
        errors.append(float((found.double() - oracle).norm() / oracle.norm()))
    return errors


def tolerance(dtype: torch.dtype) -> float:
    """Return how far a kernel may be off. bf16: weights and their gradients are rounded to 8 bits before products."""
    return 1e-6 if dtype == torch.float32 else 1.2e-2


def very_negative_scores(device: torch.device) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return output and gradients where cuDNN 9 gives NaN: a mask, 192 positions and logarithms below -88.7."""
    query, key, value = (torch.zeros(1, 1, 192, 64, dtype=torch.bfloat16, device=device) for _ in range(3))
    query[..., 0], key[..., 0] = 1.0, -960.0
    key[0, 0, 5, 0] = 960.0
    value[..., 0] = torch.arange(192)
    for part in (query, key, value):
        part.requires_grad_()
    output = fused_attention(query, key, value, KeyRanges(*(bound.to(device) for bound in causal(192))))
    return output, list(torch.autograd.grad(output.sum(), (query, key, value)))
