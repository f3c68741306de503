"""A sentencepiece model file: its pieces, what it does with text, and how pieces are added to it.

Read from and written as the bytes of the protocol buffer: sentencepiece's own reader of them needs one version of
protobuf or newer.
Source: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Literal

from sentencepiece import SentencePieceNormalizer, SentencePieceProcessor

from raptr_ds.errors import DataError

NUM_BYTES = 256
RULES = {"nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf"}  # sentencepiece's own, besides identity, which has none
_PIECE, _TRAINER, _NORMALIZER, _DENORMALIZER = 1, 2, 3, 5  # fields of ModelProto
_PIECE_TEXT, _PIECE_SCORE, _PIECE_TYPE = 1, 2, 3
_MODEL_TYPE, _VOCAB_SIZE, _WHITESPACE_AS_SUFFIX, _BYTE_FALLBACK = 3, 4, 24, 35  # fields of TrainerSpec
_ROLE_IDS = {"bos": 41, "eos": 42, "pad": 43}
_ROLE_PIECES = {"bos": 46, "eos": 47, "pad": 48}
_RULE_NAME, _CHARSMAP, _DUMMY_PREFIX, _REMOVE_WHITESPACES, _ESCAPE_WHITESPACES = 1, 2, 3, 4, 5  # of NormalizerSpec
_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
_VARINT, _LENGTH_DELIMITED = 0, 2  # wire types
_FIXED_SIZES = {1: 8, 5: 4}

_Message = Mapping[int, list[int | bytes]]


class PieceType(IntEnum):
    """What a piece is."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    """One id of the vocabulary. score: a log-probability (unigram) or minus the rank (bpe)."""

    text: str
    score: float
    type: PieceType


@dataclass(frozen=True)
class SentencepieceModel:
    """Pieces by id, and what happens to a line before it is split into them.

    charsmap: sentencepiece's compiled rules of normalization, empty without any. add_dummy_prefix: a line begins with a
    word boundary. remove_extra_whitespaces: spaces at the ends of a line are dropped, and several become one.
    """

    model_type: Literal["bpe", "unigram"]
    pieces: tuple[Piece, ...]
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool

    @property
    def user_defined(self) -> list[str]:
        """The pieces that a text always becomes where it spells them, longest first."""
        found = [piece.text for piece in self.pieces if piece.type == PieceType.USER_DEFINED]
        return sorted(found, key=len, reverse=True)


@cache
def read_sentencepiece_model(model: bytes, origin: str) -> SentencepieceModel:
    """Return the content of a serialized sentencepiece model that the library itself accepts.

    origin: names the model in errors.
    Raises: DataError naming the options that are not supported.
    """
    try:
        content = _fields(model)
        trainer, normalizer, denormalizer = (
            _fields(_merged(content, number)) for number in (_TRAINER, _NORMALIZER, _DENORMALIZER)
        )
        pieces = tuple(_piece(value) for value in content.get(_PIECE, []) if isinstance(value, bytes))
    except (ValueError, LookupError, struct.error) as error:
        raise DataError(f"the tokenizer {origin} is damaged: {error}. Copy the file again.") from error
    unused = [piece.text for piece in pieces if piece.type == PieceType.UNUSED]
    newlines = [piece.text for piece in pieces if "\n" in piece.text]  # lines are encoded one by one
    symbols = [piece.text for piece in pieces if piece.type == PieceType.USER_DEFINED]
    model_type = _MODEL_TYPES.get(_int(trainer, _MODEL_TYPE, 1), "unknown")
    rules = _bytes(normalizer, _RULE_NAME).decode(errors="replace")
    refused = {
        f"normalization_rule_tsv (rules named {rules!r})": _bytes(normalizer, _CHARSMAP) and rules not in RULES,
        "denormalization_rule_tsv": _bytes(denormalizer, _CHARSMAP),
        "escape_whitespaces=false": not _int(normalizer, _ESCAPE_WHITESPACES, 1),
        "treat_whitespace_as_suffix=true": _int(trainer, _WHITESPACE_AS_SUFFIX, 0),
        f"unused pieces such as {', '.join(unused[:3])}": unused,
        f"pieces with a new line such as {newlines[:1]}": newlines,
        f"model_type={model_type}": model_type not in {"bpe", "unigram"},
        **(_refused_symbols(model, symbols, pieces, model_type) if symbols else {}),
    }
    found = [option for option, is_set in refused.items() if is_set]
    if found:
        raise DataError(
            f"the tokenizer {origin} cannot be used: its sentencepiece model has {', '.join(found)}. Bring a model of "
            "type bpe or unigram without these options, or let tools/prepare_data.py train one (leave out --tokenizer)."
        )
    return SentencepieceModel(
        "bpe" if model_type == "bpe" else "unigram",
        pieces,
        _bytes(normalizer, _CHARSMAP),
        bool(_int(normalizer, _DUMMY_PREFIX, 1)),
        bool(_int(normalizer, _REMOVE_WHITESPACES, 1)),
    )


def _refused_symbols(
    model: bytes, symbols: Sequence[str], pieces: Sequence[Piece], model_type: str
) -> dict[str, list[str]]:
    """Return what user_defined_symbols have that cannot be done in the same way in transformers, by its name."""
    rules = SentencePieceNormalizer(
        model_proto=model, add_dummy_prefix=False, escape_whitespaces=False, remove_extra_whitespaces=False
    )
    changed = [text for text in symbols if {text} != {rules.normalize(text), "".join(rules.normalize(list(text)))}]
    spaced = [text for text in symbols if " " in text]  # sentencepiece itself never finds these
    as_is = _field(_CHARSMAP, b"") + _field(_DUMMY_PREFIX, 0) + _field(_REMOVE_WHITESPACES, 0)
    processor = SentencePieceProcessor(model_proto=model + _field(_NORMALIZER, as_is))
    texts = [piece.text for piece in pieces if piece.type == PieceType.NORMAL]
    split = processor.encode([text.replace("\u2581", " ") for text in texts], out_type=str)
    # Of a bpe model a stretch between two symbols is looked up as a whole first.
    never_made = [one for one, parts in zip(texts, split, strict=True) if parts != [one] and model_type == "bpe"]
    return {
        f"user_defined_symbols that its normalization changes such as {changed[:1]}": changed,
        f"user_defined_symbols with a space such as {spaced[:1]}": spaced,
        f"user_defined_symbols beside pieces that no text becomes such as {never_made[:1]}": never_made,
    }


def with_pieces(model: bytes, controls: Sequence[str], roles: Mapping[str, str], *, add_bytes: bool) -> bytes:
    """Return the model with control pieces, and if wanted the 256 byte pieces, at the end of its vocabulary.

    Ids stay what they are. A piece of another type that has the name of one of the controls becomes a control piece
    where it is. roles: which pieces the model has for padding (pad) and the ends of a text (bos, eos).
    """
    edited, texts = bytearray(), []
    for number, value in _values(model):
        content = value
        if number == _PIECE and isinstance(value, bytes):
            texts.append(_piece(value).text)
            if texts[-1] in controls:
                content = value + _field(_PIECE_TYPE, PieceType.CONTROL)
        edited += _field(number, content)
    names = set(texts)
    added = [(f"<0x{byte:02X}>", PieceType.BYTE) for byte in range(NUM_BYTES) if add_bytes]
    added += [(name, PieceType.CONTROL) for name in controls if name not in names]
    for text, kind in added:
        texts.append(text)
        edited += _field(_PIECE, _field(_PIECE_TEXT, text.encode()) + _field(_PIECE_TYPE, kind))
    # A message that appears twice is merged, and of a value that appears twice the last one counts.
    trainer = _field(_VOCAB_SIZE, len(texts)) + (_field(_BYTE_FALLBACK, 1) if add_bytes else b"")
    for role, name in roles.items():
        trainer += _field(_ROLE_IDS[role], texts.index(name)) + _field(_ROLE_PIECES[role], name.encode())
    return bytes(edited) + _field(_TRAINER, trainer)


def _piece(message: bytes) -> Piece:
    fields = _fields(message)
    score = struct.unpack("<f", _bytes(fields, _PIECE_SCORE) or bytes(4))[0]
    return Piece(_bytes(fields, _PIECE_TEXT).decode(), score, PieceType(_int(fields, _PIECE_TYPE, PieceType.NORMAL)))


def _fields(message: bytes) -> _Message:
    """Return the values of a protocol buffer message by field number, in order."""
    fields: dict[int, list[int | bytes]] = {}
    for number, value in _values(message):
        fields.setdefault(number, []).append(value)
    return fields


def _values(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (field number, value): varints as integers, all else as bytes."""
    place = 0
    while place < len(message):
        tag, place = _read_varint(message, place)
        wire_type = tag & 7
        if wire_type == _VARINT:
            value, place = _read_varint(message, place)
            yield tag >> 3, value
        else:
            size = _FIXED_SIZES.get(wire_type)
            if size is None:
                size, place = _read_varint(message, place)
            yield tag >> 3, message[place : place + size]
            place += size


def _read_varint(message: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[place]
        place += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, place


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3 | _VARINT) + _varint(value)
    return _varint(number << 3 | _LENGTH_DELIMITED) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 128:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _merged(message: _Message, field: int) -> bytes:
    return b"".join(value for value in message.get(field, []) if isinstance(value, bytes))


def _bytes(message: _Message, field: int) -> bytes:
    return b"".join(value for value in message.get(field, [])[-1:] if isinstance(value, bytes))


def _int(message: _Message, field: int, default: int) -> int:
    return next((value for value in message.get(field, [])[-1:] if isinstance(value, int)), default)
