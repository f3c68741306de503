"""Files to documents: text, JSONL and Parquet, read as streams; what cannot be used is refused or counted."""

import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from raptr_ds.errors import DataError, RaptrError, nearest
from raptr_ds.prepare.streams import bare_suffix, lines_of_file, open_file, refuse_packed

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
PARQUET_SUFFIXES = (".parquet",)
KNOWN_SUFFIXES = (*TEXT_SUFFIXES, *JSONL_SUFFIXES, *PARQUET_SUFFIXES)
_PARQUET_MARK = b"PAR1"
MOST_NAMES = 20  # of keys or columns in a message
LARGEST_DOCUMENT_BYTES = 4 << 20


@dataclass(frozen=True)
class ReadingOptions:
    """How files become documents.

    document: what one document of a text file is: the whole file (cut at line ends where it passes 4 MiB), a paragraph
    (between blank lines) or a line. text_key: the JSON key, Parquet column or dataset column that holds the text.
    on_bad_text: whether a document that is not UTF-8 text, or a row that is not JSON or lacks the key, stops the
    reading or is skipped and counted.
    """

    document: Literal["file", "paragraph", "line"] = "file"
    text_key: str = "text"
    on_bad_text: Literal["refuse", "skip"] = "refuse"


@dataclass
class ReadingCounts:
    """What was left out, for the report at the end: counts by reason."""

    skipped: Counter[str] = field(default_factory=Counter)

    def summary(self) -> str:
        """Return the counts in brackets, to end a message with; nothing if nothing was left out."""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.skipped.items())
        return f" (skipped: {reasons})" if reasons else ""

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
    """Return the ending that says what the file holds, without .gz and its like; of a link's target if it has none."""
    suffix = bare_suffix(path)
    return suffix if suffix in KNOWN_SUFFIXES else bare_suffix(path.resolve())


def check_file(path: Path) -> None:
    """Refuse a file that can be seen not to be what its ending says, before any is read.

    Raises: DataError as refuse_packed does.
    """
    with open_file(path) as file:
        is_parquet = file.read(len(_PARQUET_MARK)) == _PARQUET_MARK and suffix_of(path) in PARQUET_SUFFIXES
    if not is_parquet:
        refuse_packed(path)


def documents_of_file(path: Path, options: ReadingOptions, counts: ReadingCounts) -> Iterator[str]:
    """Yield the documents of one file, in order, none of them empty; an unknown ending is read as text.

    Raises: DataError if the file cannot be read, or holds what the options refuse.
    """
    suffix = suffix_of(path)
    if suffix in PARQUET_SUFFIXES:
        found = _read_parquet(path, options, counts)
    elif suffix in JSONL_SUFFIXES:
        found = texts_of_rows(_rows(path, options, counts), str(path), options, counts)
    else:
        found = _read_text(path, options, counts)
    num_found, num_skipped = 0, counts.skipped.total()
    for document in found:
        if document.strip():
            num_found += 1
            yield document
        else:
            counts.skipped["empty"] += 1
    if num_found == 0 and counts.skipped.total() == num_skipped:
        counts.skipped["empty files"] += 1


def _read_text(path: Path, options: ReadingOptions, counts: ReadingCounts) -> Iterator[str]:
    is_file, begin = options.document == "file", 0
    for number, block in enumerate(_blocks(path, options.document), start=1):
        try:
            text = block.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            where = str(path) if is_file else f"{path} ({options.document} {number})"
            counts.bad_text(options, where, _not_utf8(error, block, begin), error)
        else:
            yield text.replace("\r\n", "\n").strip("\n")
        begin += len(block) if is_file else 0  # of one document the file's bytes are counted, else the document's


def _not_utf8(error: UnicodeDecodeError, content: bytes, begin: int = 0) -> str:
    """Return what is wrong with content, whose first byte is number `begin`, that is not UTF-8."""
    place = error.start + len(content) - len(error.object)  # a mark at the beginning is not in error.object
    return f"not UTF-8 text (byte 0x{content[place]:02x} at {begin + place})"


def _blocks(path: Path, document: str) -> Iterator[bytes]:
    """Cut a file into the bytes of its documents, never within a line."""
    held: list[bytes] = []
    held_bytes = 0
    for line in lines_of_file(path):
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


def _rows(path: Path, options: ReadingOptions, counts: ReadingCounts) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where each row of a JSONL file stands, and the row; blank lines are none."""
    for number, line in enumerate(lines_of_file(path), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        row = parse_row(line)
        if isinstance(row, str):
            counts.bad_text(options, where, row)
        else:
            yield where, row


def parse_row(line: bytes) -> dict[str, Any] | str:
    """Return the JSON object on a line, or why it is none, details in brackets.

    Values that JSON lacks but Python writes, such as NaN, are read; a key that stands twice is not.
    """
    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=JsonObject)
    except UnicodeDecodeError as error:
        return _not_utf8(error, line)
    except json.JSONDecodeError as error:
        return f"not JSON ({error.msg} at column {error.colno})"
    except RecursionError:
        return "JSON that is nested too deeply to be read"
    except ValueError:  # Python's limit on the digits of an integer
        return f"JSON with a number that is too long ({sys.get_int_max_str_digits()} digits at most)"
    if not isinstance(row, JsonObject):
        return "not a JSON object (every line must be one)"
    found = dict(row)
    if len(found) == len(row):
        return found
    twice = [key for key, count in Counter(key for key, _ in row).items() if count > 1]
    return f"JSON with a key that stands twice ({', '.join(map(repr, twice))}: which value counts?)"


class JsonObject(list[tuple[str, Any]]):
    """The keys and values of a JSON object, in order: a dict would keep only the last of several equal keys."""


def texts_of_rows(
    rows: Iterable[tuple[str, dict[str, Any]]], name: str, options: ReadingOptions, counts: ReadingCounts
) -> Iterator[str]:
    """Yield what rows, each with the words for where it stands, hold under the text key.

    Raises: DataError for a row without the key, with on_bad_text skip only if no row has it; as usable_text does.
    """
    key = options.text_key
    is_found = False
    lacking: dict[str, Any] | None = None
    for where, row in rows:
        if key in row:
            is_found = True
            text = usable_text(row[key], options, counts, where)
            if text is not None:
                yield text
            continue
        if options.on_bad_text == "refuse":
            raise _no_key(f"{where} has no key", row, key, ", or pass --on-bad-text skip to leave such rows out")
        counts.skipped[f"without the key {key!r}"] += 1
        lacking = lacking or row
    if lacking is not None and not is_found:
        raise _no_key(f"no row of {name} has the key", lacking, key)


def _no_key(problem: str, names: Collection[str], key: str, other_fix: str = "") -> DataError:
    """Return the error for a text key or column that is not there; names are those that are."""
    there = ", ".join(map(str, itertools.islice(names, MOST_NAMES))) or "none"
    more = f" and {len(names) - MOST_NAMES:,} more" if len(names) > MOST_NAMES else ""
    return DataError(
        f"{problem} {key!r}{nearest(key, names)}; it has {there}{more}. Name the one that holds the text with "
        f"--text-key{other_fix}."
    )


def _read_parquet(path: Path, options: ReadingOptions, counts: ReadingCounts) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    check_file(path)
    with open_file(path) as opened:
        try:
            with pyarrow.parquet.ParquetFile(opened, page_checksum_verification=True) as file:
                _check_column(file.schema_arrow, options.text_key, path)
                batches = file.iter_batches(batch_size=1024, columns=[options.text_key])
                # As bytes, since Arrow does not check that text is UTF-8.
                columns = (batch.column(options.text_key).cast(pyarrow.large_binary()) for batch in batches)
                for row, value in enumerate(value for column in columns for value in column.to_pylist()):
                    text = usable_text(value, options, counts, f"{path} row {row}")
                    if text is not None:
                        yield text
        except RaptrError:
            raise
        except Exception as error:  # a damaged file raises pyarrow's errors, and Python's for what its schema says
            raise DataError(f"cannot read {path} as Parquet: {error}. Replace or remove the file.") from error


def _check_column(schema: Any, column: str, path: Path) -> None:
    """Refuse a Parquet file that has not one column of text with this name."""
    from pyarrow import types

    number = schema.names.count(column)
    if number == 0:
        raise _no_key(f"{path} has no column", schema.names, column)
    if number > 1:
        raise DataError(f"{path} has {number} columns {column!r}. Rename all but one.")
    kind = schema.field(column).type
    if types.is_dictionary(kind):
        kind = kind.value_type
    of_text = (types.is_string, types.is_large_string, types.is_string_view)
    of_bytes = (types.is_binary, types.is_large_binary, types.is_binary_view)
    if not any(holds(kind) for holds in (*of_text, *of_bytes, types.is_null)):
        raise DataError(f"column {column!r} of {path} holds {kind}, not text. Name another with --text-key.")


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
