"""What a sentencepiece model file says beside its pieces: the options it was trained with.

Read from the bytes of the protocol buffer: sentencepiece's own reader of them needs one version of protobuf or newer.
Source: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from raptr_ds.errors import DataError

_PIECE, _TRAINER, _NORMALIZER, _DENORMALIZER = 1, 2, 3, 5  # fields of ModelProto
_PIECE_TEXT, _PIECE_SCORE, _PIECE_TYPE = 1, 2, 3
_NORMAL, _USER_DEFINED, _UNUSED, _BYTE = 1, 4, 5, 6  # types of piece
_MODEL_TYPE, _WHITESPACE_AS_SUFFIX, _BYTE_FALLBACK = 3, 24, 35  # fields of TrainerSpec
_UNIGRAM, _BPE = 1, 2  # model types
_RULE_NAME, _CHARSMAP, _DUMMY_PREFIX, _REMOVE_WHITESPACES, _ESCAPE_WHITESPACES = 1, 2, 3, 4, 5  # of NormalizerSpec

_Message = Mapping[int, list[int | bytes]]


@dataclass(frozen=True)
class Piece:
    """One id of the vocabulary. score: a log-probability (unigram) or minus the rank (bpe)."""

    text: str
    score: float
    is_text: bool
    is_byte: bool


@dataclass(frozen=True)
class SentencepieceModel:
    """A model whose options have a counterpart in transformers; pieces: by id."""

    model_type: Literal["bpe", "unigram"]
    pieces: tuple[Piece, ...]


def read_sentencepiece_model(model: bytes, origin: str) -> SentencepieceModel:
    """Return the pieces and the type of a serialized sentencepiece model that the library itself accepts.

    origin: names the model in errors.
    Raises: DataError naming the options that do anything but split text into pieces.
    """
    content = _fields(model)
    trainer, normalizer, denormalizer = (
        _fields(_bytes(content, number)) for number in (_TRAINER, _NORMALIZER, _DENORMALIZER)
    )
    pieces = [_fields(piece) for piece in content.get(_PIECE, []) if isinstance(piece, bytes)]
    types = [_int(piece, _PIECE_TYPE, _NORMAL) for piece in pieces]
    texts = [_bytes(piece, _PIECE_TEXT).decode() for piece in pieces]
    user_defined = [text for text, kind in zip(texts, types, strict=True) if kind == _USER_DEFINED]
    unused = [text for text, kind in zip(texts, types, strict=True) if kind == _UNUSED]
    rule = _bytes(normalizer, _RULE_NAME).decode()
    model_type = _int(trainer, _MODEL_TYPE, _UNIGRAM)
    refused = {
        f"normalization_rule_name={rule or 'custom'}": _bytes(normalizer, _CHARSMAP),
        "denormalization_rule_tsv": _bytes(denormalizer, _CHARSMAP),
        "add_dummy_prefix=false": not _int(normalizer, _DUMMY_PREFIX, 1),
        "remove_extra_whitespaces=true": _int(normalizer, _REMOVE_WHITESPACES, 1),
        "escape_whitespaces=false": not _int(normalizer, _ESCAPE_WHITESPACES, 1),
        "treat_whitespace_as_suffix=true": _int(trainer, _WHITESPACE_AS_SUFFIX, 0),
        "byte_fallback=false": not _int(trainer, _BYTE_FALLBACK, 0),
        f"user_defined_symbols={','.join(user_defined[:3])}": user_defined,
        f"unused pieces such as {', '.join(unused[:3])}": unused,
        "a model_type other than bpe and unigram": model_type not in {_BPE, _UNIGRAM},
    }
    found = [option for option, is_set in refused.items() if is_set]
    if found:
        raise DataError(
            f"the tokenizer {origin} cannot be given to transformers: its sentencepiece model has {', '.join(found)}. "
            "Only models that keep the text as it is can: normalization_rule_name=identity, add_dummy_prefix=true, "
            "remove_extra_whitespaces=false, byte_fallback=true, and no user_defined_symbols, as "
            "tools/prepare_data.py trains them."
        )
    scores = [_float(piece, _PIECE_SCORE) for piece in pieces]
    return SentencepieceModel(
        "bpe" if model_type == _BPE else "unigram",
        tuple(
            Piece(text, score, kind == _NORMAL, kind == _BYTE)
            for text, score, kind in zip(texts, scores, types, strict=True)
        ),
    )


def _fields(message: bytes) -> _Message:
    """Return the values of a protocol buffer message by field number, in order.

    Varints are returned as integers, all else as bytes.
    """
    fields: dict[int, list[int | bytes]] = {}
    stream = iter(message)
    for tag in _varints(stream):
        kind = tag & 7
        if kind == 0:
            value: int | bytes = next(_varints(stream))
        else:
            length = {1: 8, 5: 4}.get(kind) or next(_varints(stream))
            value = bytes(next(stream) for _ in range(length))
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _varints(stream: Iterator[int]) -> Iterator[int]:
    value = shift = 0
    for byte in stream:
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            yield value
            value = shift = 0


def _bytes(message: _Message, field: int) -> bytes:
    return b"".join(value for value in message.get(field, [])[-1:] if isinstance(value, bytes))


def _int(message: _Message, field: int, default: int) -> int:
    return next((value for value in message.get(field, [])[-1:] if isinstance(value, int)), default)


def _float(message: _Message, field: int) -> float:
    return struct.unpack("<f", _bytes(message, field) or bytes(4))[0]
