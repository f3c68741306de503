"""Files to documents: text, JSONL and Parquet, read as streams; what cannot be used is refused or counted."""

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from raptr_ds.errors import DataError, nearest

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
PARQUET_SUFFIXES = (".parquet",)
LARGEST_DOCUMENT_BYTES = 4 << 20


@dataclass(frozen=True)
class ReadingOptions:
    """How files become documents.

    document: what one document of a text file is: the whole file (cut at line ends where it passes 4 MiB), a paragraph
    (between blank lines) or a line. text_key: the JSON key, Parquet column or dataset column that holds the text.
    on_bad_text: whether a document that is not UTF-8 text stops the reading or is skipped and counted.
    """

    document: Literal["file", "paragraph", "line"] = "file"
    text_key: str = "text"
    on_bad_text: Literal["refuse", "skip"] = "refuse"


@dataclass
class ReadingCounts:
    """What was left out, for the report at the end: counts by reason."""

    skipped: Counter[str] = field(default_factory=Counter)

    def bad_text(self, options: ReadingOptions, where: str, problem: str, cause: Exception | None = None) -> None:
        """Count a document that cannot be used, or refuse it.

        Raises: DataError that names the place, with on_bad_text refuse.
        """
        if options.on_bad_text == "refuse":
            raise DataError(
                f"{where}: {problem}. Fix it, or pass --on-bad-text skip to leave such documents out and count them."
            ) from cause
        self.skipped[problem.partition(" (")[0]] += 1


def suffix_of(path: Path) -> str:
    """Return the ending that says what the file holds, without .gz."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def documents_of_file(path: Path, options: ReadingOptions, counts: ReadingCounts) -> Iterator[str]:
    """Yield the documents of one file, in order, none of them empty; an unknown ending is read as text.

    Raises: DataError if the file cannot be read, or holds what the options refuse.
    """
    suffix = suffix_of(path)
    if suffix in PARQUET_SUFFIXES:
        found = _read_parquet(path, options, counts)
    elif suffix in JSONL_SUFFIXES:
        found = _read_jsonl(path, options, counts)
    else:
        found = _read_text(path, options, counts)
    for document in found:
        if document.strip():
            yield document
        else:
            counts.skipped["empty"] += 1


def _open(path: Path) -> BinaryIO:
    try:
        return cast(BinaryIO, gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}. Check its permissions.") from error


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file with their ends.

    Raises: DataError if reading fails, for instance on a truncated .gz.
    """
    with _open(path) as stream:
        try:
            yield from stream
        except (OSError, EOFError) as error:
            raise DataError(f"cannot read {path} to its end: {error}. Replace or remove the file.") from error


def _read_text(path: Path, options: ReadingOptions, counts: ReadingCounts) -> Iterator[str]:
    for number, block in enumerate(_blocks(path, options.document)):
        try:
            text = block.decode("utf-8-sig" if number == 0 else "utf-8")
        except UnicodeDecodeError as error:
            where = f"{path} ({options.document} {number})" if options.document != "file" else str(path)
            problem = f"not UTF-8 text (byte 0x{block[error.start]:02x} at {error.start})"
            counts.bad_text(options, where, problem, error)
            continue
        yield text.replace("\r\n", "\n").strip("\n")


def _blocks(path: Path, document: str) -> Iterator[bytes]:
    """Cut a file into the bytes of its documents, never within a line."""
    held: list[bytes] = []
    held_bytes = 0
    for line in _lines(path):
        blank = document == "paragraph" and not line.strip()
        if held and (document == "line" or blank or held_bytes + len(line) > LARGEST_DOCUMENT_BYTES):
            yield b"".join(held)
            held, held_bytes = [], 0
        if blank:
            continue
        held.append(line)
        held_bytes += len(line)
    if held:
        yield b"".join(held)


def _read_jsonl(path: Path, options: ReadingOptions, counts: ReadingCounts) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            record = json.loads(line)
        except UnicodeDecodeError as error:
            counts.bad_text(options, where, "not UTF-8 text", error)
            continue
        except json.JSONDecodeError as error:
            counts.bad_text(options, where, f"not JSON ({error.msg} at column {error.colno})", error)
            continue
        if not isinstance(record, dict):
            counts.bad_text(options, where, "not a JSON object (every line must be one)")
            continue
        text = usable_text(value_of(record, options, where, "--json-key"), options, counts, where)
        if text is not None:
            yield text


def _read_parquet(path: Path, options: ReadingOptions, counts: ReadingCounts) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    column = options.text_key
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise DataError(
                    f"{path} has no column {column!r}{nearest(column, names)}; it has {', '.join(names)}. Name the one "
                    "that holds the text with --text-key."
                )
            kind = file.schema_arrow.field(column).type
            if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.large_binary()):
                raise DataError(f"column {column!r} of {path} holds {kind}, not text. Name another with --text-key.")
            batches = file.iter_batches(batch_size=1024, columns=[column])
            # As bytes, since Arrow does not check that text is UTF-8.
            values = (value for batch in batches for value in batch.column(0).cast(pyarrow.large_binary()).to_pylist())
            for row, value in enumerate(values):
                text = usable_text(value, options, counts, f"{path} row {row}")
                if text is not None:
                    yield text
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"cannot read {path} as Parquet: {error}. Replace or remove the file.") from error


def value_of(record: dict[str, Any], options: ReadingOptions, where: str, option: str) -> object:
    """Return what a row holds under the text key.

    Raises: DataError if it has no such key; the message recommends `option` to name another.
    """
    key = options.text_key
    if key not in record:
        raise DataError(
            f"{where} has no key {key!r}{nearest(key, record)}; it has {', '.join(map(str, record))}. Name the one "
            f"that holds the text with {option}."
        )
    return record[key]


def usable_text(value: object, options: ReadingOptions, counts: ReadingCounts, where: str) -> str | None:
    """Return a value as text, or None if it is left out and counted.

    Raises: DataError if it is not text, with on_bad_text refuse.
    """
    if value is None:
        counts.skipped["empty"] += 1
        return None
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            counts.bad_text(options, where, f"not UTF-8 text (at byte {error.start})", error)
            return None
    if not isinstance(value, str):
        counts.bad_text(options, where, f"not text but {type(value).__name__}")
        return None
    if re.search("[\ud800-\udfff]", value):
        counts.bad_text(options, where, "not UTF-8 text (half of a surrogate pair)")
        return None
    if not value.strip():
        counts.skipped["empty"] += 1
        return None
    return value
