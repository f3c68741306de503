"""Statistics of a few seeds: mean and spread, and differences paired by seed with Student's t interval."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Values of n seeds; deviation is the sample standard deviation (n - 1), None for one seed."""

    n: int
    mean: float
    deviation: float | None
    least: float
    most: float


@dataclass(frozen=True)
class PairedDifference:
    """Ours minus theirs over the n seeds that both have.

    half_width: of the t interval around the mean at CONFIDENCE, None for one pair. num_lower: pairs in which ours is
    lower, that is better for a loss.
    """

    n: int
    mean: float
    half_width: float | None
    num_lower: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def summarize(values: Sequence[float]) -> Summary | None:
    """Return the summary of the values, None if there are none."""
    if not values:
        return None
    return Summary(len(values), float(np.mean(values)), _deviation(values), min(values), max(values))


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> PairedDifference | None:
    """Return the difference of two sets of values by seed, None if they have no seed in common."""
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if not differences:
        return None
    n, deviation, half = len(differences), _deviation(differences), None
    if deviation is not None:
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * deviation / math.sqrt(n)
    return PairedDifference(n, float(np.mean(differences)), half, sum(difference < 0 for difference in differences))


def _deviation(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
