"""The gradient norm against sums in fp64, for tensors of any size, cut up in any way."""

import pytest
import torch
import torch.distributed as dist

from raptr_ds.engine.gradient_norm import LossCheck, global_norm
from raptr_ds.parallel.groups import ProcessGroups, lone_process_groups


def norm_of(tensors: list[torch.Tensor], groups: ProcessGroups, check: LossCheck | None = None) -> float:
    return global_norm(tensors, check or LossCheck(), groups).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_that_of_fp64_whatever_the_pieces(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.exp(2 * torch.randn(4_000_003, generator=generator))
    gradient = (torch.randn(4_000_003, generator=generator) * spread).to(dtype)
    exact = gradient.double().square().sum().sqrt().item()
    with lone_process_groups() as groups:
        for cuts in ([], [1], [1023, 1024, 1025], [5, 70_000, 3_999_999], [2_000_000]):
            pieces = list(torch.tensor_split(gradient, cuts))
            assert norm_of(pieces, groups) == pytest.approx(exact, rel=2e-7), cuts
        matrix = gradient[:4_000_000].view(2000, 2000)
        assert norm_of([matrix.t()], groups) == pytest.approx(norm_of([matrix], groups), rel=2e-7)
        assert norm_of([gradient[:0]], groups) == norm_of([], groups) == 0


def test_a_number_that_is_not_finite_shows_wherever_it_is() -> None:
    with lone_process_groups() as groups:
        for place in (0, 1023, 1024, 4999):
            gradient = torch.ones(5000)
            gradient[place] = float("nan")
            assert not torch.tensor(norm_of([gradient], groups)).isfinite()
        check = LossCheck()
        check.observe(torch.tensor(float("inf")))
        assert not torch.tensor(norm_of([torch.ones(3)], groups, check)).isfinite()
        assert norm_of([torch.ones(4)], groups, check) == 2
    assert not dist.is_initialized()
