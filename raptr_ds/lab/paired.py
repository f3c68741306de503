"""Differences of a few runs, paired by seed, with Student's t interval."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy import stats

CONFIDENCE = 0.95


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

    def __str__(self) -> str:
        """The mean with half of its interval; * marks one that excludes zero."""
        half = "" if self.half_width is None else f" ± {self.half_width:.4f}"
        return f"{self.mean:+.4f}{half}{' *' if self.is_clear else ''}"


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> PairedDifference | None:
    """Return the difference of two sets of values by seed, None if they have no seed in common."""
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if not differences:
        return None
    n, half = len(differences), None
    if n > 1:
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * stdev(differences) / math.sqrt(n)
    return PairedDifference(n, fmean(differences), half, sum(difference < 0 for difference in differences))
