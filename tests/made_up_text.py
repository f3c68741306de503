"""Text for the tests of data: a made-up language, a source of documents given as a list, and the way back to text."""

from collections.abc import Iterator, Sequence

import numpy as np
import sentencepiece

from raptr_ds.data.indexed import IndexedTokens
from raptr_ds.data.tokenizer import NEWLINE, Tokenizer
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


def documents_of(split: IndexedTokens) -> list[np.ndarray]:
    """Return the tokens of each document, with its end-of-document token."""
    return np.split(split.tokens.read(0, len(split.tokens)), np.cumsum(split.lengths)[:-1])


def text_of(tokenizer: Tokenizer, tokens: np.ndarray) -> str:
    """Return the text of tokens, by sentencepiece line by line; special tokens have none."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    (ends,) = np.nonzero(tokens == processor.piece_to_id(NEWLINE))
    lines = [line[line != processor.piece_to_id(NEWLINE)] for line in np.split(tokens, ends)]
    return "\n".join(processor.decode(line.tolist()) for line in lines)


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
