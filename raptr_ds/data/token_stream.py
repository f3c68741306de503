"""A corpus as an endless, shuffled stream of text windows of which each one is a pure function of its number."""

from functools import lru_cache

import numpy as np

from raptr_ds.data.indexed import IndexedTokens
from raptr_ds.data.permutation import Permutation
from raptr_ds.errors import DataError
from raptr_ds.rng import stream


class TokenStream:
    """Windows of `window` consecutive tokens, documents joined by their end-of-document tokens.

    An epoch cuts the corpus, as a ring, into num_tokens // window windows that do not overlap, beginning at a point of
    its own, and visits them in an order of its own. So an epoch reads every token once (but for the less than one
    window that is left over), and no state is needed to go on anywhere.
    A corpus shorter than a window is one window of all its tokens.
    """

    def __init__(self, corpus: IndexedTokens, window: int, seed: int, purpose: str, vocab_size: int) -> None:
        """Read `corpus` in windows of `window` >= 1 tokens, shuffled by (seed, purpose)."""
        assert window >= 1, window
        self.corpus = corpus
        self.seed = seed
        self.purpose = purpose
        self.vocab_size = vocab_size
        self.window = min(window, len(corpus.tokens))
        self.windows_per_epoch = len(corpus.tokens) // self.window
        self._order = lru_cache(maxsize=4)(self._order_of)

    def _order_of(self, epoch: int) -> tuple[Permutation, int]:
        """Return the order of an epoch's windows, and the token at which the first one begins."""
        permutation = Permutation(self.windows_per_epoch, self.seed, epoch, self.purpose)
        return permutation, int(stream(self.seed, "offset", self.purpose, epoch).integers(len(self.corpus.tokens)))

    def read(self, index: int) -> np.ndarray:
        """Return window `index` (window,) int64, a pure function of (seed, purpose, index); index >= 0 has no end.

        Raises: DataError if a token is outside the vocabulary, which the check at opening may have missed.
        """
        epoch, place = divmod(index, self.windows_per_epoch)
        permutation, offset = self._order(epoch)
        tokens = self.corpus.tokens
        start = (offset + permutation(place) * self.window) % len(tokens)
        found = tokens[start : start + self.window].astype(np.int64)
        if len(found) < self.window:
            found = np.concatenate([found, tokens[: self.window - len(found)].astype(np.int64)])
        if found.max() >= self.vocab_size or found.min() < 0:
            raise DataError(
                f"{self.corpus.prefix.with_suffix('.bin')} holds a token id outside the vocabulary of "
                f"{self.vocab_size} in "
                f"the {self.window} tokens from {start}: it is damaged. Run tools/prepare_data.py --overwrite."
            )
        return found
