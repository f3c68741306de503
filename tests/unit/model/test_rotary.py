"""Rotary positions against complex numbers: each pair of features is a number turned by position times frequency."""

import cmath

import pytest
import torch

from raptr_ds.model.attention import rotary_table, rotate

CPU = torch.device("cpu")


def turned(vector: list[float], position: int, base: float) -> list[float]:
    """Return the vector with features i and i + d/2 as real and imaginary part, turned by position * base^(-2i/d)."""
    half = len(vector) // 2
    numbers = [
        complex(vector[i], vector[i + half]) * cmath.exp(1j * position * base ** (-2 * i / len(vector)))
        for i in range(half)
    ]
    return [number.real for number in numbers] + [number.imag for number in numbers]


@pytest.mark.parametrize(("length", "head_dim", "base"), [(7, 8, 10000.0), (5, 2, 100.0), (40, 6, 500000.0)])
def test_rotation_is_multiplication_by_a_unit_complex_number(length: int, head_dim: int, base: float) -> None:
    x = torch.randn(2, 3, length, head_dim, generator=torch.Generator().manual_seed(1))
    rotated = rotate(x, rotary_table(length, head_dim, base, CPU))
    for position in range(length):
        expected = [[turned(head.tolist(), position, base) for head in sample] for sample in x[:, :, position]]
        # fp32 angles up to 40 carry 4e-6 of rounding.
        torch.testing.assert_close(rotated[:, :, position], torch.tensor(expected), atol=2e-5, rtol=0)


def test_scores_depend_on_distance_only() -> None:
    query, key = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(2)).expand(2, 1, 1, 32, 16)
    table = rotary_table(32, 16, 10000.0, CPU)
    scores = (rotate(query, table) @ rotate(key, table).transpose(-1, -2))[0, 0]
    for distance in range(-31, 32):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=0)
    assert not torch.allclose(scores[0, 0], scores[0, 9])


def test_the_first_position_and_all_norms_stay() -> None:
    x = torch.randn(1, 2, 9, 12, generator=torch.Generator().manual_seed(3))
    rotated = rotate(x, rotary_table(9, 12, 10000.0, CPU))
    assert torch.equal(rotated[:, :, 0], x[:, :, 0])
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_computed_in_fp32_and_returned_in_its_own_type(dtype: torch.dtype) -> None:
    x = torch.randn(1, 2, 9, 12, generator=torch.Generator().manual_seed(4)).to(dtype)
    table = rotary_table(9, 12, 10000.0, CPU)
    rotated = rotate(x, table)
    assert rotated.dtype == dtype
    # Rounded once, at the end.
    wanted = rotate(x.float(), table)
    assert torch.equal(rotated.float(), wanted.to(dtype).float()) or dtype == torch.float64
