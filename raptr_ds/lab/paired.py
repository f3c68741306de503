"""Statistics of a few seeds: mean and spread, and differences paired by seed with Student's t interval."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Values of n seeds; deviation is the sample's (n - 1), None for one seed."""

    n: int
    mean: float
    deviation: float | None
    least: float
    most: float


@dataclass(frozen=True)
class PairedDifference:
    """Ours minus theirs over the n seeds that both have.

    half_width: of the t interval around the mean at CONFIDENCE, None for one pair. num_lower: pairs in which ours is
    lower, so better for a loss.
    """

    n: int
    mean: float
    half_width: float | None
    num_lower: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def summarize(values: Sequence[float]) -> Summary | None:
    """Return the summary of the values, None if there are none."""
    if not values:
        return None
    mean = math.fsum(values) / len(values)
    return Summary(len(values), mean, _deviation(values, mean), min(values), max(values))


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> PairedDifference | None:
    """Return the difference of two sets of values by seed, None if they have no seed in common."""
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if not differences:
        return None
    n, mean = len(differences), math.fsum(differences) / len(differences)
    deviation = _deviation(differences, mean)
    half = None if deviation is None else student_t_quantile((1 + CONFIDENCE) / 2, n - 1) * deviation / math.sqrt(n)
    return PairedDifference(n, mean, half, sum(difference < 0 for difference in differences))


def student_t_quantile(probability: float, freedom: int) -> float:
    """Return the t below which a t variable of `freedom` degrees lies with this probability, 0.5 < probability < 1."""
    assert 0.5 < probability < 1, probability
    assert freedom >= 1, freedom
    low, high = 0.0, 1.0
    while student_t_cdf(high, freedom) < probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if student_t_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def student_t_cdf(t: float, freedom: int) -> float:
    """Return the probability that a t variable lies below t.

    Source: Abramowitz and Stegun 26.7.3 (odd degrees) and 26.7.4 (even), sums in theta = atan(t / sqrt(freedom)).
    """
    theta = math.atan(t / math.sqrt(freedom))
    sine, square = math.sin(theta), math.cos(theta) ** 2
    is_odd = freedom % 2 == 1
    term = math.cos(theta) if is_odd else 1.0
    total = 0.0
    for number in range((freedom - 1) // 2 if is_odd else freedom // 2):
        total += term
        factor = (2 * number + 2) / (2 * number + 3) if is_odd else (2 * number + 1) / (2 * number + 2)
        term *= factor * square
    both_sides = 2 / math.pi * (theta + sine * total) if is_odd else sine * total
    return 0.5 + both_sides / 2


def _deviation(values: Sequence[float], mean: float) -> float | None:
    if len(values) < 2:
        return None
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
