"""Medians of ratios, and how sure they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from statistics import median

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class MedianRatio:
    """A median and its confidence interval of 95% or more, by order statistics: no distribution is assumed.

    With five samples or fewer no interval is that sure, and this is all that was seen.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, numerators: Sequence[float], denominators: Sequence[float], unit: float = 1.0) -> "MedianRatio":
        """Take the ratios within each round, in units of `unit`: what slows a whole round down cancels."""
        ratios = sorted(a / b / unit for a, b in zip(numerators, denominators, strict=True))
        skipped = _left_out(len(ratios))
        return cls(median(ratios), ratios[skipped], ratios[-1 - skipped])

    @classmethod
    def of_separate(
        cls, numerators: Sequence[float], denominators: Sequence[float], unit: float = 1.0
    ) -> "MedianRatio":
        """Take the ratio of medians of samples that share no rounds: wider, as each has an interval of its own."""
        above, below = cls.of(numerators, [unit] * len(numerators)), cls.of(denominators, [1.0] * len(denominators))
        return cls(above.value / below.value, above.low / below.high, above.high / below.low)

    def against(self, aim: float) -> str:
        """Say whether an aim, to be this large or larger, holds, and whether the samples could tell."""
        verdict = "holds" if self.value >= aim else "missed"
        return f"{verdict}, within the noise" if self.low < aim <= self.high else verdict


def _left_out(count: int) -> int:
    """Return how many of `count` sorted samples the interval leaves out at each end.

    The median is below the k-th smallest with the chance of fewer than k heads in `count` throws of a coin.
    """
    skipped, chance = 0, 0.5**count
    while skipped < (count - 1) // 2:
        chance += comb(count, skipped + 1) * 0.5**count
        if 2 * chance > 1 - _CONFIDENCE:
            break
        skipped += 1
    return skipped
