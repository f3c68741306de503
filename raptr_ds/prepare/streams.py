"""Files as streams of lines: what is compressed is unpacked on the way, and archives are refused.

What a file begins with decides how it is unpacked, so that a name which says something else does no harm.
"""

import bz2
import gzip
import io
import lzma
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from raptr_ds.errors import DataError
from raptr_ds.user_paths import path_error

COMPRESSED_SUFFIXES = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".xz": "xz", ".bz2": "bzip2"}
_COMPRESSED = {
    "gzip": re.compile(rb"\x1f\x8b"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),  # a frame, or one that holds no data
    "xz": re.compile(rb"\xfd7zXZ\0"),
    "bzip2": re.compile(rb"BZh[1-9](1AY&SY|\x17\x72\x45\x38\x50\x90)"),  # with a block, or empty
}
_PACKED = {
    "a zip archive": re.compile(rb"PK(\x03\x04|\x05\x06|\x07\x08)"),  # also .docx, .epub, .npz
    "a 7z archive": re.compile(rb"7z\xbc\xaf\x27\x1c"),
    "a rar archive": re.compile(rb"Rar!\x1a\x07"),
    "an ar archive": re.compile(rb"!<arch>\n"),
    "lz4 data": re.compile(rb"\x04\x22\x4d\x18"),
    "lzip data": re.compile(rb"LZIP\x01"),
    "lzma data": re.compile(rb"\x5d\0\0.{2}([\0-\xff]\0{7}|\xff{8})", re.DOTALL),
    "data of the program compress": re.compile(rb"\x1f[\x9d\xa0]"),
    **{f"{name} data": magic for name, magic in _COMPRESSED.items()},
}
_PARQUET = re.compile(rb"PAR1\x15")  # the mark, and the first byte of a header after it
_HEAD_BYTES = 512  # the first header of a tar archive
_CHUNK_BYTES = 1 << 16


def bare_suffix(path: Path) -> str:
    """Return the ending of a name in lower case; of one that is compressed, the ending before that."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED_SUFFIXES else suffix


def open_file(path: Path) -> BinaryIO:
    """Open a file as it is. Raises: DataError if it cannot be opened, PathError if there can be no such path."""
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}. Check its permissions.") from error
    except ValueError as error:
        raise path_error(path, error) from error


def lines_of_file(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file with their ends, unpacked if it is compressed.

    Raises: DataError as refuse_packed does, and if the file cannot be read to its end. No option skips a damaged file:
        nobody knows how much of it is lost.
    """
    refuse_packed(path)
    with open_file(path) as file:
        try:
            yield from _unpacked(file, compression_of(_beginning(file)))
        except Exception as error:  # each decompressor has its own: zlib.error, LZMAError, EOFError, pyarrow's
            raise _unreadable(path, error) from error


def refuse_packed(path: Path) -> None:
    """Refuse a file whose first bytes show that it does not hold lines of text, or is not what its name says.

    Raises: DataError for an archive, a Parquet file, a compression that is not read here, two of them, or none although
        the name promises one; also if the file cannot be opened or is damaged where it begins.
    """
    with open_file(path) as file:
        try:
            head = _beginning(file)
            packing = compression_of(head)
            content = _unpacked(file, packing).read(_HEAD_BYTES) if packing else head
        except Exception as error:  # as in lines_of_file
            raise _unreadable(path, error) from error
    promised = COMPRESSED_SUFFIXES.get(path.suffix.lower())
    if promised and not packing:
        raise DataError(
            f"cannot read {path} to its end: it {f'does not begin as {promised} data does' if head else 'is empty'}. "
            "Replace or remove the file; if it holds text, give it another ending."
        )
    inside = f" inside {packing} data" if packing else ""
    if _PARQUET.match(content):
        fix = "unpack it first, and " if packing else ""
        raise DataError(f"{path} is a Parquet file{inside}: {fix}give it a name that ends in .parquet.")
    kind = next((name for name, magic in _PACKED.items() if magic.match(content)), None)
    if kind is None and _is_tar(content):
        kind = "a tar archive"
    if kind:
        raise DataError(
            f"{path} is {kind}{inside}, not text: unpack it first, and give --input the files that it holds."
        )


def compression_of(head: bytes) -> str | None:
    """Return how a file that begins like this is compressed: gzip, zstd, xz, bzip2, or None."""
    return next((name for name, magic in _COMPRESSED.items() if magic.match(head)), None)


def _beginning(file: BinaryIO) -> bytes:
    head = file.read(_HEAD_BYTES)
    file.seek(0)
    return head


def _unpacked(file: BinaryIO, packing: str | None) -> BinaryIO:
    if packing is None:
        return file
    if packing == "gzip":
        return cast(BinaryIO, gzip.open(file))
    if packing == "bzip2":
        return io.BufferedReader(_JoinedStreams(file, bz2.BZ2Decompressor), _CHUNK_BYTES)
    if packing == "xz":
        return io.BufferedReader(_JoinedStreams(file, lzma.LZMADecompressor), _CHUNK_BYTES)
    import pyarrow

    return io.BufferedReader(cast(Any, pyarrow.input_stream(file, compression=packing)), _CHUNK_BYTES)


class _JoinedStreams(io.RawIOBase):
    """Compressed streams that follow each other in a file, unpacked.

    `bz2.open` and `lzma.open` end in silence where something other than a stream follows a stream, and pyarrow (26)
    fails at an empty bzip2 stream.
    """

    def __init__(self, file: BinaryIO, decompressor: type[bz2.BZ2Decompressor] | type[lzma.LZMADecompressor]) -> None:
        self._file = file
        self._new = decompressor
        self._decompressor = decompressor()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data:
            chunk = b""
            if self._decompressor.eof:
                chunk = self._decompressor.unused_data.lstrip(b"\0")  # padding
                while not chunk:
                    chunk = self._file.read(_CHUNK_BYTES)
                    if not chunk:
                        return 0
                    chunk = chunk.lstrip(b"\0")
                self._decompressor = self._new()
            elif self._decompressor.needs_input:
                chunk = self._file.read(_CHUNK_BYTES)
                if not chunk:
                    raise EOFError("the file ends before its compressed data does")
            data = self._decompressor.decompress(chunk, len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _is_tar(head: bytes) -> bool:
    """Return whether these bytes are a tar archive's first header, checksum included."""
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = str(error) or type(error).__name__
    return DataError(f"cannot read {path} to its end: {reason}. Replace or remove the file.")
