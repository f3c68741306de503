"""Packing: each document of a window becomes an example of its own, and the examples share a sequence."""

from typing import Protocol

import numpy as np

from raptr_ds.data.sample import PackedSample, Sample

SMALLEST_TEXT = 2  # tokens of which an objective can hide some and keep some


class PackableObjective(Protocol):
    """An objective that can be asked for samples shorter than a sequence."""

    window: int
    smallest_room: int
    """Tokens that a sample of SMALLEST_TEXT tokens takes at most."""

    def sample(self, text: np.ndarray, rng: np.random.Generator, room: int | None = None) -> Sample:
        """Corrupt `text`, or as much of it as gives a sample of at most `room` tokens."""
        ...


class PackedDocuments:
    """Makes packed samples: the documents of a window, in order, each corrupted by itself, until the sequence is full.

    A document that the window cuts is the part that is in it. What no longer fits is left out, as is a document of a
    single token. Where no text is longer than that, the window is one example.
    """

    def __init__(self, objective: PackableObjective, seq_length: int, end_id: int) -> None:
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
