"""Making up for missed steps, against torch's AdamW stepping with zero gradients."""

import pytest
import torch

from raptr_ds.engine.idle_decay import _condensed, make_up_for

BETAS, EPS, DECAY = (0.9, 0.999), 1e-8, 0.1


def after_some_steps(
    steps: int, scale: float, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.optim.AdamW]:
    """Return a weight with moments from `steps` random gradients of sizes around `scale`, and its optimizer."""
    generator = torch.Generator().manual_seed(steps)
    weight = torch.randn(500, generator=generator, dtype=dtype).requires_grad_()
    optimizer = torch.optim.AdamW([weight], lr=1e-3, betas=BETAS, eps=EPS, weight_decay=DECAY)
    for _ in range(steps):
        sizes = scale * 10.0 ** torch.empty(500, dtype=dtype).uniform_(-3, 3, generator=generator)
        weight.grad = torch.randn(500, generator=generator, dtype=dtype) * sizes
        optimizer.step()
    return weight, optimizer


@pytest.mark.parametrize("missed", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("steps", [1, 10, 300])
@pytest.mark.parametrize("scale", [1e-8, 1e-2])  # around eps, where no single closed form holds, and usual
def test_it_is_torchs_adamw(missed: int, steps: int, scale: float) -> None:
    """In fp64, so that the mathematics shows: the two agree to far below fp32's rounding."""
    weight, optimizer = after_some_steps(steps, scale, torch.float64)
    state = optimizer.state[weight]
    found = weight.detach().clone(), state["exp_avg"].clone(), state["exp_avg_sq"].clone()
    rates = [1e-3 * (1 + number % 3) for number in range(missed)]
    before, count = weight.detach().clone(), float(state["step"])
    make_up_for(*found, count, rates, betas=BETAS, eps=EPS, weight_decay=DECAY)
    for rate in rates:
        weight.grad = torch.zeros_like(weight)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    moved = (weight - before).abs().max()
    assert moved > 0
    assert (found[0] - weight).abs().max() < 3e-9 * moved
    torch.testing.assert_close(found[1], state["exp_avg"], rtol=1e-12, atol=0)
    torch.testing.assert_close(found[2], state["exp_avg_sq"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("missed", [1, 3, 20])
def test_in_fp32_it_is_exact_to_rounding(missed: int) -> None:
    weight, optimizer = after_some_steps(50, 1e-2)
    state = optimizer.state[weight]
    found = weight.detach().clone(), state["exp_avg"].clone(), state["exp_avg_sq"].clone()
    make_up_for(*found, 50.0, [1e-3] * missed, betas=BETAS, eps=EPS, weight_decay=DECAY)
    for _ in range(missed):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    # torch rounds at each of the missed steps: half a unit in the last place of the weight, twice a step.
    torch.testing.assert_close(found[0], weight.detach(), rtol=missed * 1.2e-7, atol=missed * 1e-9)


def test_late_in_a_run_two_terms_stand_for_many() -> None:
    def terms(step: int, missed: int) -> list[tuple[float, float]]:
        return [
            (0.9**n / (1 - 0.9 ** (step + n)), (0.999**n / (1 - 0.999 ** (step + n))) ** 0.5)
            for n in range(1, missed + 1)
        ]

    assert len(_condensed(terms(1000, 12))) == 2
    assert len(_condensed(terms(1, 12))) == 12  # right after the first step the terms differ too much
    assert _condensed(terms(1000, 2)) == terms(1000, 2)


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.9, 0.9), (0.95, 0.9), (0.9, 0.0)])
def test_layers_that_sit_out_a_whole_phase(betas: tuple[float, float]) -> None:
    """Thousands of steps: nothing overflows, and no more terms are added up than momentum lasts."""
    weight, optimizer = after_some_steps(20, 1e-2, torch.float64)
    state = optimizer.state[weight]
    found = weight.detach().clone(), state["exp_avg"].clone(), state["exp_avg_sq"].clone()
    stepped = weight.detach().clone().requires_grad_()
    other = torch.optim.AdamW([stepped], lr=1e-4, betas=betas, eps=EPS, weight_decay=DECAY)
    other.state[stepped] = {"step": torch.tensor(20.0), "exp_avg": found[1].clone(), "exp_avg_sq": found[2].clone()}
    make_up_for(*found, 20.0, [1e-4] * 8000, betas=betas, eps=EPS, weight_decay=DECAY)
    for _ in range(8000):
        stepped.grad = torch.zeros_like(stepped)
        other.step()
    torch.testing.assert_close(found[0], stepped.detach(), rtol=1e-9, atol=1e-12)


def test_a_layer_that_never_moved_only_decays() -> None:
    weight, zeros = torch.ones(3), torch.zeros(3)
    make_up_for(weight, zeros.clone(), zeros.clone(), 0.0, [0.1, 0.2], betas=BETAS, eps=EPS, weight_decay=0.5)
    torch.testing.assert_close(weight, torch.full((3,), 0.95 * 0.9))
