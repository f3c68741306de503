"""Packing: each document of a window of text is an example of its own."""

import numpy as np

from raptr_ds.data.batch import PackedSample, Sample
from raptr_ds.data.denoisers import MixtureOfDenoisers
from raptr_ds.data.masked_lm import MaskedLM

SMALLEST_TEXT = 2  # tokens; an objective hides at least one and keeps at least one


class PackedDocuments:
    """Makes packed samples: the documents of a window, in order, each corrupted by itself, until the sequence is full.

    Of a document that the window cuts, the part inside counts. What no longer fits is left out, and so are documents of
    a single token. If there are no longer ones, the window is one example.
    """

    def __init__(self, objective: MaskedLM | MixtureOfDenoisers, seq_length: int, end_id: int) -> None:
        """Pack samples of `objective`; end_id: the token that ends each document."""
        self.window = objective.window
        self._objective, self._seq_length, self._end_id = objective, seq_length, end_id

    def sample(self, text: np.ndarray, rng: np.random.Generator) -> PackedSample:
        """Make the examples of `text` (at most `window` tokens, int64)."""
        ends = np.flatnonzero(text == self._end_id) + 1
        documents = [part for part in np.split(text, ends) if len(part) >= SMALLEST_TEXT] or [text]
        parts: list[Sample] = []
        room = self._seq_length
        for document in documents:
            if room < self._objective.smallest_room:
                break
            parts.append(self._objective.sample(document, rng, room))
            room -= len(parts[-1].tokens)
        return PackedSample(tuple(parts))
