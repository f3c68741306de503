"""Text for the tests of data: a made-up language, and a source of documents given as a list."""

from collections.abc import Iterator, Sequence

import numpy as np

from raptr_ds.prepare.corpus import digest_of
from raptr_ds.prepare.indexing import PreparationSettings
from raptr_ds.prepare.readers import ReadingCounts
from raptr_ds.prepare.tokenizer_training import TokenizerSettings

SETTINGS = PreparationSettings(
    TokenizerSettings(vocab_size=800, num_sentinels=100), None, 0.1, min_validation_tokens=100
)


def made_up_text(seed: int, num_lines: int) -> str:
    """Return lines of words over a few letters; the same for the same seed."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("abcdeghiklmnorstu"), rng.integers(1, 9))) for _ in range(300)]
    lines = [" ".join(words[i] for i in (rng.random(12) ** 2 * len(words)).astype(int)) for _ in range(num_lines)]
    return ".\n".join(lines)


class TextSource:
    """Documents in memory."""

    def __init__(self, texts: Sequence[str], name: str = "texts") -> None:
        self.texts = list(texts)
        self._name = name

    @property
    def name(self) -> str:
        return self._name

    def documents(self, counts: ReadingCounts) -> Iterator[str]:
        yield from self.texts

    def fingerprint(self) -> str:
        return digest_of(self.texts)

    def size_bytes(self) -> int:
        return sum(len(text.encode()) for text in self.texts)
