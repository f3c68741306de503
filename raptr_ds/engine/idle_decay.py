"""AdamW's steps with zero gradients, made up for at once: what `zero_grad` asks of a layer that sat out some steps.

With a zero gradient the moments only shrink, by known factors, so n steps change a weight w of moments m and v by

    w <- w d - m f(sqrt(v)),   f(s) = sum over the steps j of a_j / (b_j s + eps),

where d, a_j and b_j are numbers that hold for the whole layer. f is a sum of n nearly equal terms: two of them, placed
and weighted so that they agree with the sum up to its fourth order (Gauss quadrature), stand for all, unless the
error could show in fp32; then the terms are added one by one.
"""

import math
from collections.abc import Sequence

import torch

_NEGLIGIBLE = 1e-9  # of the update, which itself is a small part of the weight: far below fp32's 6e-8
_GONE = 1e-13  # of a sum: nothing that its other terms would show
_FORGOTTEN = 1e-28  # of the first numerators: over eps still nothing beside them over any gradient's size


def make_up_for(
    weight: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: float,
    rates: Sequence[float],
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Change weight and moments, in place, as torch's AdamW would in len(rates) steps with a zero gradient.

    step: steps made before; rates: the learning rate of each missed step, in order.
    """
    beta1, beta2 = betas
    count = len(rates)
    tail, terms = 1.0, []
    for number in range(count, 0, -1):  # from the last: each step's update is decayed by the steps after it
        rate = rates[number - 1]
        first = 1.0 - beta1 ** (step + number)
        second = 1.0 - beta2 ** (step + number)
        terms.append((tail * rate * beta1**number / first, math.sqrt(beta2**number / second)))
        tail *= 1.0 - rate * weight_decay
    root = exp_avg_sq.sqrt()
    weight.mul_(tail)
    for numerator, factor in _condensed(terms):
        weight.addcdiv_(exp_avg, root * factor + eps, value=-numerator)
    exp_avg.mul_(beta1**count)
    exp_avg_sq.mul_(beta2**count)


def _condensed(terms: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most two terms (a, b) whose sum of a / (b s + eps) is that of all, or all terms if it were not.

    a / (b s + eps) is (a / b) / (s + eps / b), so the sum is an integral over x = 1 / b with the masses a / b; what
    the two nodes leave out is at most the mean of ((x - x_1) (x - x_2))^2 over the smallest x^4, whatever s is.
    """
    terms = _without_late_terms(terms)
    if len(terms) <= 2 or min(b for _, b in terms) == 0.0:  # beta_2 = 0 leaves nothing but eps
        return terms
    masses, places = [a / b for a, b in terms], [1.0 / b for _, b in terms]
    total = sum(masses)
    center = sum(m * x for m, x in zip(masses, places, strict=True)) / total
    second, third = (
        sum(m * (x - center) ** power for m, x in zip(masses, places, strict=True)) / total for power in (2, 3)
    )
    if second <= (1e-9 * center) ** 2:
        return [(total / center, 1.0 / center)]
    # The nodes are the roots of y^2 - (third / second) y - second around the center.
    half = third / second / 2
    spread = math.sqrt(half**2 + second)
    low, high = half - spread, half + spread
    error = sum(m * ((x - center - low) * (x - center - high)) ** 2 for m, x in zip(masses, places, strict=True))
    if center + low <= 0.0 or error / total > _NEGLIGIBLE * min(places) ** 4:
        return terms
    high_mass = total * -low / (high - low)
    return [
        (mass / place, 1.0 / place) for mass, place in ((total - high_mass, center + low), (high_mass, center + high))
    ]


def _without_late_terms(terms: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Drop terms that are lost beside the others where s is small (there they are a / eps) and large (a / (b s))."""
    for_small = sum(a for a, _ in terms)
    for_large = sum(a / b for a, b in terms if b > 0.0)
    terms = [(a, b) for a, b in terms if a > _FORGOTTEN * for_small]
    return [(a, b) for a, b in terms if a > _GONE * for_small or (b > 0.0 and a / b > _GONE * for_large)]
