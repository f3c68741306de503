"""Train a sentencepiece model with our special tokens on a sample of documents; the same text gives the same model."""

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import sentencepiece

from raptr_ds.data.tokenizer import BOS, CLS, EOS, MASK, MODES, NAMED_SPECIALS, PAD, SEP, UNK, Tokenizer, sentinel_name
from raptr_ds.errors import ConfigError, DataError
from raptr_ds.prepare.corpus import DistinctParagraphs, Source
from raptr_ds.prepare.readers import ReadingCounts
from raptr_ds.sentencepiece_model import NUM_BYTES

# Fixed, because sentencepiece's result depends on the number of threads.
NUM_THREADS = 4
LONGEST_LINE = 1000
DEFAULT_VOCAB_SIZE = 8192
LARGEST_VOCAB_SIZE = 2**31 - 1  # ids are 32-bit integers


@dataclass(frozen=True)
class TokenizerSettings:
    """What a tokenizer is trained with; the same settings and documents give the same bytes.

    Raises: ConfigError for numbers out of range.
    Units: vocab_size in ids, including special ones, sentinels and the 256 byte pieces; None is the default size, or
    the largest that a small corpus supports. sample_bytes limits the text to train on. bpe is the default because it
    trains ten times as fast as unigram and encoded as compactly (38 MB of documentation, 8,192 pieces).
    """

    vocab_size: int | None = None
    num_sentinels: int = 256
    model_type: Literal["unigram", "bpe"] = "bpe"
    sample_bytes: int = 50_000_000

    def __post_init__(self) -> None:
        for option, value, lowest in (
            ("--sentinels", self.num_sentinels, 0),
            ("--tokenizer-sample-bytes", self.sample_bytes, 1),
        ):
            if value < lowest:
                raise ConfigError(f"{option} {value} must be at least {lowest}.")
        if self.vocab_size is not None:
            self.first_vocab_size()

    def first_vocab_size(self) -> int:
        """Return the number of ids to try first.

        Raises: ConfigError if it leaves no room for text, or is more than ids can number.
        """
        size = DEFAULT_VOCAB_SIZE if self.vocab_size is None else self.vocab_size
        if size <= self.smallest_vocab_size:
            raise ConfigError(
                f"--vocab-size {size} leaves no room for text: {len(NAMED_SPECIALS)} special tokens, "
                f"{self.num_sentinels} sentinels and {NUM_BYTES} bytes take {self.smallest_vocab_size}. Raise "
                "--vocab-size or lower --sentinels."
            )
        if size > LARGEST_VOCAB_SIZE:
            raise ConfigError(f"--vocab-size {size} is more than ids can number. Use {LARGEST_VOCAB_SIZE} at most.")
        return size

    @property
    def smallest_vocab_size(self) -> int:
        """Ids taken by special tokens and bytes before the first ordinary piece."""
        return len(NAMED_SPECIALS) + self.num_sentinels + NUM_BYTES


def sample_documents(
    sources: Sequence[Source], sample_bytes: int, counts: ReadingCounts | None = None
) -> Iterator[str]:
    """Yield documents from the beginning of every source, about `sample_bytes` in all; count what is left out.

    Each source may fill an equal share, and what small ones leave is shared by the larger ones: no large file decides
    alone on the tokenizer, and none has to be read to its end.
    """
    # Each part of a corpus by name has its share; repeated paragraphs do no harm here.
    whole = [source.sources if isinstance(source, DistinctParagraphs) else (source,) for source in sources]
    sources = list(chain.from_iterable(whole))
    sizes = [source.size_bytes() for source in sources]
    order = sorted(range(len(sources)), key=lambda i: (sizes[i] is None, sizes[i] or 0))
    left = sample_bytes
    counts = counts or ReadingCounts()
    for rank, number in enumerate(order):
        share = left / (len(order) - rank)
        taken = 0
        for document in sources[number].documents(counts):
            yield document
            taken += len(document.encode())
            if taken >= share:
                break
        left -= taken
        if left <= 0:
            return


def train_tokenizer(sources: Sequence[Source], settings: TokenizerSettings) -> Tokenizer:
    """Train on a sample of the documents of `sources`.

    Raises: ConfigError if the vocabulary is too small for its special tokens or too large for the text; DataError if
        there is no text.
    """
    size = settings.first_vocab_size()
    counts = ReadingCounts()
    lines = list(_training_lines(sample_documents(sources, settings.sample_bytes, counts)))
    if not lines:
        raise DataError(f"cannot train a tokenizer: the corpus holds no text{counts.summary()}. Check --input.")
    try:
        return Tokenizer(_train(lines, size, settings), "the tokenizer just trained")
    except RuntimeError as error:
        message = str(error)  # of sentencepiece 0.2
        if match := re.search(r"set it to a value <= (\d+)", message):
            if settings.vocab_size is None:
                return Tokenizer(_train(lines, int(match[1]), settings), "the tokenizer just trained")
            raise ConfigError(
                f"--vocab-size {size} is too large for this corpus of {sum(map(len, lines)):,} characters: the largest "
                f"possible is {match[1]}. Lower it, leave it out, or add text."
            ) from error
        if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
            raise ConfigError(
                f"--vocab-size {size} is too small: the special tokens and the characters of this corpus take "
                f"{match[1]}. Raise it to {match[1]} or more, or lower --sentinels."
            ) from error
        raise DataError(f"sentencepiece could not train a tokenizer: {error}") from error


def _train(lines: list[str], vocab_size: int, settings: TokenizerSettings) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=vocab_size,
        model_type=settings.model_type,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        character_coverage=0.9995,
        max_sentence_length=4 * LONGEST_LINE + 1,
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        pad_piece=PAD,
        unk_piece=UNK,
        bos_piece=BOS,
        eos_piece=EOS,
        control_symbols=[CLS, SEP, MASK, *MODES, *map(sentinel_name, range(settings.num_sentinels))],
        num_threads=NUM_THREADS,
        minloglevel=2,
    )
    return model.getvalue()


def _training_lines(documents: Iterable[str]) -> Iterator[str]:
    """Yield lines as the tokenizer encodes them, cut to lengths that sentencepiece accepts."""
    for document in documents:
        for line in document.split("\n"):
            if not line.strip() or "\0" in line:  # sentencepiece's trainer refuses NUL
                continue
            for start in range(0, len(line), LONGEST_LINE):
                yield line[start : start + LONGEST_LINE]
