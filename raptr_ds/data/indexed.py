"""Indexed tokens on disk: megatron-core's .bin/.idx format, checked before it is read.

The format (megatron-core 0.16, datasets/indexed_dataset.py): .bin is the tokens, one document after the other; .idx is
a header, then lengths (int32), byte offsets (int64) and the document boundaries (int64). It is written by
raptr_ds/prepare/index_writer.py.
"""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np

from raptr_ds.errors import DataError
from raptr_ds.user_paths import read_error

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {4: np.dtype(np.int32), 8: np.dtype(np.uint16)}
CHECKED_TOKENS, _BLOCK_TOKENS = 1 << 20, 1 << 10

FIX = "Prepare it again: tools/prepare_data.py --overwrite."


@contextmanager
def reading(path: Path, fix: str = FIX) -> Iterator[None]:
    """Raise DataError with the fix, or StorageError, where the operating system cannot read a file in this block."""
    try:
        yield
    except OSError as error:
        raise read_error(path, error) or DataError(f"cannot read {path}: {error.strerror or error}. {fix}") from error


class TokenFile:
    """The tokens of a .bin, num_tokens of a dtype, all documents one after the other; any thread may read them.

    The file is read and not mapped: where a mapped file becomes shorter, the process ends by SIGBUS without a message.
    """

    def __init__(self, path: Path, dtype: np.dtype, num_tokens: int, vocab_size: int) -> None:
        self._path, self._dtype, self._num_tokens, self._vocab_size = path, dtype, num_tokens, vocab_size
        with reading(path):
            self._file = FileIO(path)

    def __len__(self) -> int:
        """Return the number of tokens."""
        return self._num_tokens

    def read(self, first: int, count: int) -> np.ndarray:
        """Return up to `count` tokens from token `first` on, fewer at the end of the file.

        Raises: DataError if they cannot be read or are outside the vocabulary, or the file is shorter than it was.
        """
        count = max(0, min(count, self._num_tokens - first))
        size = self._dtype.itemsize
        with reading(self._path, "Check its disk."):
            content = os.pread(self._file.fileno(), count * size, first * size)
        if len(content) < count * size:
            raise DataError(
                f"{self._path} has become shorter while it was read: it ends before token {first + count:,} of "
                f"{self._num_tokens:,}. Start again when it is whole. {FIX}"
            )
        tokens = np.frombuffer(content, self._dtype)
        if count and (tokens.min() < 0 or tokens.max() >= self._vocab_size):
            wrong = tokens.min() if tokens.min() < 0 else tokens.max()
            raise DataError(
                f"{self._path} holds the token id {wrong}, outside the tokenizer's vocabulary of {self._vocab_size}: "
                f"it is damaged from token {first} on, or was made with another tokenizer. {FIX}"
            )
        return tokens


@dataclass(frozen=True)
class IndexedTokens:
    """A checked pair of files. lengths: (num_documents,) int32, in tokens."""

    tokens: TokenFile
    lengths: np.ndarray

    def document(self, index: int) -> np.ndarray:
        """Return the tokens of one document, its end-of-document token included."""
        start = int(self.lengths[:index].sum(dtype=np.int64))
        return self.tokens.read(start, int(self.lengths[index]))


def open_indexed(prefix: Path, vocab_size: int) -> IndexedTokens:
    """Open PREFIX.idx and PREFIX.bin and check everything that a run relies on.

    Of the token ids, which are checked when they are read, a million are read here, in blocks spread evenly.
    Raises: DataError that names the file, what is wrong with it and how to fix it.
    """
    index_path, tokens_path = prefix.with_suffix(".idx"), prefix.with_suffix(".bin")
    lengths, dtype = _read_index(index_path)
    with reading(tokens_path):
        size = tokens_path.stat().st_size
    num_tokens = int(lengths.sum(dtype=np.int64))
    if size != num_tokens * dtype.itemsize:
        kind = "truncated" if size < num_tokens * dtype.itemsize else "longer than its index says"
        raise DataError(
            f"{tokens_path} is {kind}: {size:,} bytes where {index_path.name} lists {num_tokens:,} tokens of "
            f"{dtype.itemsize} bytes. {FIX}"
        )
    if num_tokens == 0:
        raise DataError(f"{tokens_path} is empty: there is nothing to train on. Add text. {FIX}")
    tokens = TokenFile(tokens_path, dtype, num_tokens, vocab_size)
    blocks = min(CHECKED_TOKENS, num_tokens) // _BLOCK_TOKENS + 1
    for number in range(blocks):
        tokens.read(num_tokens * number // blocks, _BLOCK_TOKENS)
    return IndexedTokens(tokens, lengths)


def _read_index(path: Path) -> tuple[np.ndarray, np.dtype]:
    """Return (lengths, token dtype) of an .idx after checking its parts against each other.

    It is read part by part, and not mapped, for the reason that TokenFile gives.
    """
    with reading(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        header = file.read(HEADER.size)
        if len(header) < HEADER.size:
            raise DataError(f"{path} is truncated: {size} bytes, but its header alone takes {HEADER.size}. {FIX}")
        magic, version, code, num_sequences, num_boundaries = HEADER.unpack(header)
        if magic != MAGIC or version != VERSION:
            raise DataError(f"{path} is not an index of tokens: it begins with {magic!r}, version {version}. {FIX}")
        if code not in DTYPES:
            raise DataError(f"{path} holds tokens of kind {code}; 4 (int32) and 8 (uint16) are known. {FIX}")
        expected = HEADER.size + num_sequences * 12 + num_boundaries * 8
        if size != expected:
            raise DataError(
                f"{path} is damaged: {size:,} bytes where its header, with {num_sequences:,} sequences and "
                f"{num_boundaries:,} boundaries, needs {expected:,}. {FIX}"
            )
        dtype = DTYPES[code]
        if num_sequences == 0:
            raise DataError(f"{path} is empty: it lists no document. Add text. {FIX}")
        lengths = np.fromfile(file, "<i4", num_sequences)
        if (lengths < 0).any():
            raise DataError(f"{path} is damaged: document {int(np.argmax(lengths < 0))} has a negative length. {FIX}")
        starts = (np.cumsum(lengths, dtype=np.int64) - lengths) * dtype.itemsize
        if not np.array_equal(np.fromfile(file, "<i8", num_sequences), starts):
            raise DataError(f"{path} is damaged: its offsets do not follow from its lengths. {FIX}")
        bounds = np.fromfile(file, "<i8", num_boundaries)
        if len(bounds) == 0 or bounds[0] != 0 or bounds[-1] != num_sequences or (np.diff(bounds) < 0).any():
            raise DataError(
                f"{path} is damaged: its document boundaries do not cover its {num_sequences:,} sequences. {FIX}"
            )
    return lengths, dtype
