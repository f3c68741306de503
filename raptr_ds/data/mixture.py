"""Blend corpora by weight: which corpus sample s comes from, and its number there, as a pure function of s."""

from collections.abc import Mapping
from fractions import Fraction

from raptr_ds.errors import ConfigError


class Mixture:
    """Interleaves named corpora in exact proportion to their weights.

    A corpus of share f has floor(n f + 1/2) of the first n samples against the rest, which are divided among the others
    in the same way. All is exact arithmetic: after n samples each of K corpora is within K of its share, and exactly on
    it wherever every n f is whole. Nothing is drawn: the order within each corpus is shuffled already.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        """Take relative weights by name.

        Raises: ConfigError if there are none or one is not a positive number.
        """
        if not weights:
            raise ConfigError('raptr_ds.data.path is empty. Give a data folder, or {"FOLDER": weight, ...}.')
        for name, weight in weights.items():
            if not 0 < weight < float("inf"):
                raise ConfigError(
                    f"the weight of {name} in raptr_ds.data.path is {weight}; weights must be positive numbers."
                )
        self.names = tuple(weights)
        exact = [Fraction(str(weight)) for weight in weights.values()]
        self._shares = [exact[i] / sum(exact[i:]) for i in range(len(exact))]

    def locate(self, sample: int) -> tuple[int, int]:
        """Return (corpus, index): sample `sample` is number `index` of the samples of corpus `corpus`."""
        for corpus, share in enumerate(self._shares):
            before = _count(sample, share)
            if _count(sample + 1, share) > before:
                return corpus, before
            sample -= before
        raise AssertionError("the last share is one")


def _count(num_samples: int, share: Fraction) -> int:
    """Return floor(num_samples * share + 1/2)."""
    return (2 * num_samples * share.numerator + share.denominator) // (2 * share.denominator)
