"""Attention in 16 bits on a CPU: short sequences go through fp32, long ones through torch's kernel, both right."""

import pytest
import torch

from raptr_ds.model.attention import _attend


def in_fp64(query, key, value, mask):
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return (scores if mask is None else scores + mask).softmax(-1) @ value


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [128, 129])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_result_and_gradients_are_those_of_fp64(dtype, length, masked):
    generator = torch.Generator().manual_seed(length)
    given = [torch.randn(2, 3, length, 16, generator=generator).to(dtype).requires_grad_() for _ in range(3)]
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    mask = torch.zeros(length, length).masked_fill_(torch.ones(length, length).triu(1).bool(), -torch.inf)
    mask = mask.to(dtype)[None, None] if masked else None
    result = _attend(*given, mask)
    expected = in_fp64(*exact, mask if mask is None else mask.double())
    assert result.dtype == dtype
    weight = torch.randn(result.shape, generator=generator).to(dtype)
    (result * weight).sum().backward()
    (expected * weight.double()).sum().backward()
    # In fp32 the result is rounded to 16 bits once; torch's kernel rounds attention's weights and partial sums, too.
    roundings = (1 if length <= 128 else 4) if dtype.itemsize == 2 else 8
    for found, oracle in [(result, expected), *((a.grad, b.grad) for a, b in zip(given, exact, strict=True))]:
        error = (found.double() - oracle).abs().max() / oracle.abs().max()
        assert error < roundings * torch.finfo(dtype).eps
