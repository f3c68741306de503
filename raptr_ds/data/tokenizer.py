"""The tokenizer: a sentencepiece model with the special tokens that BERT and UL2 need."""

import hashlib
import itertools
from collections.abc import Iterable
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import sentencepiece

from raptr_ds.atomic_file import write_atomically
from raptr_ds.errors import DataError
from raptr_ds.user_paths import read_error

PAD, UNK, BOS, EOS = "[PAD]", "[UNK]", "[BOS]", "[EOS]"
CLS, SEP, MASK = "[CLS]", "[SEP]", "[MASK]"
MODES = ("[NLU]", "[S2S]", "[NLG]")
MODE_NAMES = tuple(mode.strip("[]") for mode in MODES)
NAMED_SPECIALS = (PAD, UNK, BOS, EOS, CLS, SEP, MASK, *MODES)
# Pieces that sentencepiece knows by what they are for, whatever their names; here those that we give them.
ROLES = {"pad": PAD, "bos": BOS, "eos": EOS}
NEWLINE = "<0x0A>"
WORD_BOUNDARY = "\u2581"

TRAIN_ONE = "Train one that has them: python tools/train_tokenizer.py --input TEXT --output FILE --vocab-size N."
ADD_THEM = "tools/prepare_data.py --tokenizer FILE adds them: use the tokenizer.model in the data folder that it makes."


def sentinel_name(index: int) -> str:
    """Return the piece of sentinel `index`, which stands for the span of that number in inputs and targets."""
    return f"<extra_id_{index}>"


class Tokenizer:
    """Text to token ids; special ids are control pieces, which no text can produce.

    Lines are encoded one by one and joined by the newline byte, so that a word at the start of a line is the same
    token as inside it. Decoding gives the normalized text: each line as the model's normalizer leaves it, which for a
    model that tools/prepare_data.py trains is the line itself (except that U+2581, by which sentencepiece represents a
    space, becomes one).
    """

    def __init__(self, model: bytes, origin: str = "memory") -> None:
        """Load a serialized sentencepiece model; `origin` names it in errors.

        Raises: DataError if it is not a sentencepiece model or lacks a special token.
        """
        self.model, self.origin = model, origin
        self._processor = processor = open_processor(model, origin)
        missing = missing_specials(processor)
        if lacks_bytes(processor):
            missing.append(f"byte pieces such as {NEWLINE} (sentencepiece's byte_fallback)")
        if missing:
            raise DataError(
                f"the tokenizer {origin} lacks {', '.join(missing)}; BERT and UL2 need them as control pieces. "
                f"{ADD_THEM}"
            )
        self.vocab_size: int = processor.get_piece_size()  # ids run from 0, special ones included
        self.pad_id: int = processor.pad_id()  # fills positions beyond a sample's length
        self.unk_id: int = processor.unk_id()  # unknown text; byte fallback leaves it unused
        self.bos_id: int = processor.bos_id()  # begins a text; unused in pretraining, for downstream use
        self.eos_id: int = processor.eos_id()  # ends a document and the targets of span corruption
        # These begin and end a BERT sample, and hide a token in it.
        self.cls_id, self.sep_id, self.mask_id = map(processor.piece_to_id, (CLS, SEP, MASK))
        self.newline_id: int = processor.piece_to_id(NEWLINE)  # joins lines
        self.mode_ids: dict[str, int] = {name: processor.piece_to_id(name) for name in MODES}

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a sentencepiece model from a file.

        Raises: DataError if the file is missing, unreadable or not a model, or lacks a special token.
        """
        return cls(read_model_file(path), str(path))

    def save(self, path: str | Path) -> None:
        """Write the model to a file, or replace it at once."""
        write_atomically(Path(path), self.model)

    @cached_property
    def sentinel_ids(self) -> np.ndarray:
        """Ids (num_sentinels,) int64 of <extra_id_0>, <extra_id_1>, ..., up to the first that is missing."""
        names = itertools.takewhile(partial(is_control, self._processor), map(sentinel_name, itertools.count()))
        return np.array([self._processor.piece_to_id(name) for name in names], np.int64)

    @cached_property
    def is_special(self) -> np.ndarray:
        """Table (vocab_size,) bool: the ids that no text produces (control pieces and unknown)."""
        processor = self._processor
        return np.array([processor.is_control(i) or processor.is_unknown(i) for i in range(self.vocab_size)])

    @cached_property
    def text_ids(self) -> np.ndarray:
        """Ids (n,) int64 that text can produce, in order: what a random replacement is drawn from."""
        return np.flatnonzero(~self.is_special)

    @cached_property
    def starts_word(self) -> np.ndarray:
        """Table (vocab_size,) bool: the ids that begin a word, a new line or are special."""
        processor = self._processor
        begins = [processor.id_to_piece(i).startswith(WORD_BOUNDARY) for i in range(self.vocab_size)]
        table = np.array(begins) | self.is_special
        table[self.newline_id] = True
        return table

    @cached_property
    def digest(self) -> str:
        """Hexadecimal digest of the model: the same for tokenizers with the same ids, and only for these."""
        return hashlib.blake2b(self.model, digest_size=16).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Return the token ids (n,) int32 of `text`, without special tokens.

        Raises: DataError for a text that UTF-8 cannot represent.
        """
        try:
            lines = self._processor.encode(text.split("\n"))
        except TypeError as error:  # sentencepiece's, without a reason
            place = next(place for place, character in enumerate(text) if "\ud800" <= character < "\ue000")
            raise DataError(
                f"a text cannot be encoded: {text[place]!r}, its character {place}, is half of a surrogate pair. "
                "Replace it."
            ) from error
        ids = list(itertools.chain.from_iterable((*line, self.newline_id) for line in lines))
        return np.array(ids[:-1], np.int32)

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of `tokens`, without special tokens."""
        lines: list[list[int]] = [[]]
        for token in map(int, tokens):
            if token == self.newline_id:
                lines.append([])
            else:
                lines[-1].append(token)
        return "\n".join(self._processor.decode(line) for line in lines)

    def pieces(self, tokens: Iterable[int]) -> list[str]:
        """Return the pieces of `tokens`, special ones by name."""
        return [self._processor.id_to_piece(int(token)) for token in tokens]

    def require_sentinels(self, needed: int, purpose: str) -> None:
        """Check that there are enough sentinels.

        Raises: DataError that names both numbers if there are fewer than `needed`.
        """
        have = len(self.sentinel_ids)
        if have < needed:
            raise DataError(
                f"the tokenizer {self.origin} has {have} sentinels (<extra_id_i>), but {purpose} needs {needed}. "
                f"Prepare the data again with tools/prepare_data.py --sentinels {needed} (without --tokenizer, or with "
                "one that has no sentinels yet), or choose a shorter seq_length."
            )


def read_model_file(path: str | Path) -> bytes:
    """Return the content of a file that should be a sentencepiece model. Raises: DataError if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        away = read_error(path, error) if isinstance(error, OSError) else None
        raise away or DataError(
            f"cannot read the tokenizer {path}: {getattr(error, 'strerror', None) or error}. Name a sentencepiece "
            ".model file, or leave the tokenizer out to use the one in the data folder (tools/prepare_data.py writes "
            "it)."
        ) from error


def open_processor(model: bytes, origin: str) -> sentencepiece.SentencePieceProcessor:
    """Load a serialized model. Raises: DataError if it is not one."""
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(model)
    except (RuntimeError, ValueError) as error:
        raise DataError(f"{origin} is not a sentencepiece model ({error}). {TRAIN_ONE}") from error
    return processor


def is_control(processor: sentencepiece.SentencePieceProcessor, name: str) -> bool:
    """Return whether a model has a control piece of this name."""
    token = processor.piece_to_id(name)
    return processor.id_to_piece(token) == name and processor.is_control(token)


def missing_specials(processor: sentencepiece.SentencePieceProcessor) -> list[str]:
    """Return our names of the special tokens, besides sentinels, that a model lacks."""
    missing = [name for role, name in ROLES.items() if getattr(processor, f"{role}_id")() < 0]
    return missing + [name for name in (CLS, SEP, MASK, *MODES) if not is_control(processor, name)]


def lacks_bytes(processor: sentencepiece.SentencePieceProcessor) -> bool:
    """Return whether a model has no byte pieces, for the newline and for characters beyond its vocabulary."""
    return not processor.is_byte(processor.piece_to_id(NEWLINE))
