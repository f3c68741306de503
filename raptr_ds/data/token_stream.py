"""Which text a sample reads: its corpus and a window of it, shuffled, each a pure function of the sample's number."""

from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache

import numpy as np

from raptr_ds.data.indexed import TokenFile
from raptr_ds.rng import stream, stream_key

NUM_ROUNDS = 6
WORD = (1 << 64) - 1


def _mix(value: int) -> int:
    """Scramble 64 bits: the finalizer of SplitMix64 (Steele et al. 2014)."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & WORD
    return value ^ (value >> 31)


class Permutation:
    """A bijection of range(size), a pure function of (seed, epoch, purpose), computed without a table.

    A Feistel network over the next even number of bits, applied again until the value is inside the range (cycle
    walking, Black and Rogaway 2002): less than four times on average, whatever the size.
    """

    def __init__(self, size: int, seed: int, epoch: int, purpose: str) -> None:
        """Derive the round keys; size >= 1."""
        assert size >= 1, size
        self.size = size
        self._half = (max(size - 1, 1).bit_length() + 1) // 2
        self._mask = (1 << self._half) - 1
        self._keys = [stream_key(seed, "permutation", purpose, epoch, number) for number in range(NUM_ROUNDS)]

    def __call__(self, index: int) -> int:
        """Return where `index` goes; 0 <= index < size."""
        assert 0 <= index < self.size, (index, self.size)
        value = self._network(index)
        while value >= self.size:
            value = self._network(value)
        return value

    def _network(self, value: int) -> int:
        left, right = value >> self._half, value & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right + key & WORD) & self._mask)
        return left << self._half | right


class TokenStream:
    """An endless, shuffled stream of windows of `window` consecutive tokens, each a pure function of its number.

    An epoch cuts the corpus, taken as a ring, into num_tokens // window windows that do not overlap, from a random
    starting point and in a random order. So it reads every token once, except a remainder of less than a window, and
    reading can start at any number without any state. Windows cross the ends of documents. A corpus shorter than a
    window is one window of all its tokens.
    """

    def __init__(self, tokens: TokenFile, window: int, seed: int, purpose: str) -> None:
        """Read a corpus in windows of `window` >= 1 tokens, shuffled by (seed, purpose)."""
        assert window >= 1, window
        self.tokens, self.seed, self.purpose = tokens, seed, purpose
        self.window = min(window, len(tokens))
        self.windows_per_epoch = len(tokens) // self.window
        self._order = lru_cache(maxsize=4)(self._order_of)

    def _order_of(self, epoch: int) -> tuple[Permutation, int]:
        """Return the order of an epoch's windows, and the token at which the first one begins."""
        permutation = Permutation(self.windows_per_epoch, self.seed, epoch, self.purpose)
        return permutation, int(stream(self.seed, "offset", self.purpose, epoch).integers(len(self.tokens)))

    def read(self, index: int) -> np.ndarray:
        """Return window `index` (window,) int64, a pure function of (seed, purpose, index); index >= 0 has no limit.

        Raises: DataError if a token cannot be read or is outside the vocabulary.
        """
        epoch, place = divmod(index, self.windows_per_epoch)
        permutation, offset = self._order(epoch)
        start = (offset + permutation(place) * self.window) % len(self.tokens)
        found = self.tokens.read(start, self.window)
        if len(found) < self.window:
            found = np.concatenate([found, self.tokens.read(0, self.window - len(found))])
        return found.astype(np.int64)


class Mixture:
    """Interleaves named corpora in exact proportion to their weights.

    The first corpus, of share f, has floor(n f + 1/2) of the first n samples; the rest is divided among the others in
    the same way. In exact arithmetic: after n samples each of K corpora is within K of its share, and has exactly its
    share if every n f is an integer. Nothing is random: the order within each corpus is shuffled already.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        """Take positive, relative weights by name; at least one."""
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
