"""Whatever is in a file, a reader gives all of its documents, counts what it leaves out, or raises our own error."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raptr_ds.errors import DataError
from raptr_ds.prepare.corpus import FileSource
from raptr_ds.prepare.readers import ReadingCounts, ReadingOptions
from tests.unit.prepare.test_streams import PACK

# Pieces that mean something to a reader, so that few examples meet many cases.
PIECES = [b"\n", b"\r\n", b"\r", b" ", b"\t", b"\xef\xbb\xbf", b"word", "né \u2028".encode(), b"\xff", b"\xed\xa0\x80"]
PIECES += [
    b"\0",
    b"\x1f\x8b",
    b"\x28\xb5\x2f\xfd",
    b"BZh91AY&SY",
    b"\xfd7zXZ\0",
    b"PK\x03\x04",
    b"PAR1\x15",
    b"\xff\xfe",
]
TEXT_BYTES = st.lists(st.sampled_from(PIECES) | st.binary(max_size=8), max_size=12).map(b"".join)
NUMBERS = st.sampled_from(["0", "-1", "1e400", "NaN", "-Infinity", "9" * 4300, "9" * 4301, "01", "1.5"])
SCALARS = NUMBERS | st.sampled_from(["null", "true", '"\\ud800"', '"\\ud83d\\ude00"', '"\\u0000"', "[" * 20_000])
VALUES = st.recursive(
    SCALARS | st.text(max_size=8).map(json.dumps),
    lambda inner: st.lists(inner, max_size=2).map(lambda parts: f"[{','.join(parts)}]"),
    max_leaves=3,
)
KEYS = st.sampled_from(["text", "text", "body", "\\u0074ext"])
OBJECTS = st.lists(st.tuples(KEYS, VALUES), max_size=3).map(
    lambda pairs: "{" + ", ".join(f'"{key}": {value}' for key, value in pairs) + "}"
)
ROWS = st.lists((OBJECTS | VALUES).map(str.encode) | TEXT_BYTES, max_size=5).map(b"\n".join)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@dataclass
class Reading:
    """The documents of a file, how many were left out, and our own error if reading ended with one."""

    documents: list[str]
    num_skipped: int
    error: DataError | None = None


def read(path: Path, content: bytes, **options: Any) -> Reading:
    """Read a file with this content; any error but our own fails the test."""
    path.write_bytes(content)
    counts = ReadingCounts()
    documents: list[str] = []
    try:
        documents += FileSource(path, ReadingOptions(**{"on_bad_text": "skip"} | options)).documents(counts)
    except DataError as error:
        return Reading(documents, counts.skipped.total(), error)
    return Reading(documents, counts.skipped.total())


def is_packed(content: bytes) -> bool:
    return content.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ\0", b"PK\x03\x04", b"PAR1\x15"))


def as_text(content: bytes) -> str | None:
    """Return content as text if it is any but space."""
    try:
        text = content.decode().replace("\r\n", "\n").strip("\n")
    except UnicodeDecodeError:
        return None
    return text if text.strip() else None


@given(content=TEXT_BYTES, document=st.sampled_from(["file", "line", "paragraph"]))
def test_text(folder: Path, content: bytes, document: str) -> None:
    reading = read(folder / "a.txt", content, document=document)
    if reading.error:
        assert is_packed(content)
        return
    body = content.removeprefix(b"\xef\xbb\xbf")
    if document == "file":
        parts = [body]
    elif document == "line":
        parts = re.findall(rb"[^\n]*\n|[^\n]+", body) or [b""]
    else:
        parts = paragraphs(content)
    expected = [text for text in map(as_text, parts) if text is not None]
    assert reading.documents == expected
    assert reading.num_skipped == len(parts) - len(expected)


def paragraphs(content: bytes) -> list[bytes]:
    """Return what stands between blank lines; the mark that may begin a file makes its line not blank."""
    parts: list[bytes] = [b""]
    for line in content.split(b"\n"):
        if line.strip():
            parts[-1] += line + b"\n"
        elif parts[-1]:
            parts.append(b"")
    first, *others = [part for part in parts if part] or [b""]  # an empty file is counted as one
    return [first.removeprefix(b"\xef\xbb\xbf"), *others]


@given(content=ROWS)
def test_jsonl(folder: Path, content: bytes) -> None:
    reading = read(folder / "a.jsonl", content)
    if reading.error:
        assert is_packed(content) or "no row of" in str(reading.error)
        return
    lines = [line for line in content.split(b"\n") if line.strip()]
    assert len(reading.documents) + reading.num_skipped == max(len(lines), 1)
    assert reading.documents == [text for text in map(text_of_row, lines) if text is not None]


def text_of_row(line: bytes) -> str | None:
    """Return the text of a row by Python's own parser, None for any reason to leave it out."""
    pairs: list[list[tuple[str, Any]]] = []
    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=lambda found: pairs.append(found) or dict(found))
        text = row["text"]
        text.encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return text if text.strip() and len(pairs[-1]) == len(row) else None


@given(content=ROWS | TEXT_BYTES, name=st.sampled_from(["a.txt", "a.jsonl", "a.parquet", "a.gz", "a.json.zst"]))
def test_refusing_names_the_file_or_gives_everything(folder: Path, content: bytes, name: str) -> None:
    refusing = read(folder / name, content, on_bad_text="refuse")
    if refusing.error:
        assert name in str(refusing.error)
    else:
        assert refusing.documents == read(folder / name, content).documents


@given(
    content=st.binary(max_size=300) | st.text(max_size=100).map(str.encode),
    suffix=st.sampled_from(list(PACK)),
    damage=st.none() | st.tuples(st.floats(0, 1), st.binary(max_size=3), st.booleans()),
)
def test_compressed(folder: Path, content: bytes, suffix: str, damage: tuple[float, bytes, bool] | None) -> None:
    path = folder / f"a.txt{suffix}"
    packed = PACK[suffix](content)
    changed = packed
    if damage is not None:
        place, wrong, is_cut = damage
        start = int(place * len(packed))
        changed = packed[:start] + wrong + (b"" if is_cut else packed[start + len(wrong) :])
    reading = read(path, changed, document="line")
    if reading.error:
        assert changed != packed or is_packed(content)
        assert path.name in str(reading.error)
    elif changed == packed or suffix != ".zst":  # pyarrow writes zstd without a checksum
        assert reading.documents == read(folder / "a.txt", content, document="line").documents


TEXT_TYPES: dict[str, Callable[[list[str | None]], pyarrow.Array]] = {
    "string": lambda texts: pyarrow.array(texts, pyarrow.string()),
    "large_string": lambda texts: pyarrow.array(texts, pyarrow.large_string()),
    "string_view": lambda texts: pyarrow.array(texts, pyarrow.string_view()),
    "dictionary": lambda texts: pyarrow.array(texts, pyarrow.string()).dictionary_encode(),
    "large dictionary": lambda texts: pyarrow.array(texts, pyarrow.large_string()).dictionary_encode(),
    "binary": lambda texts: pyarrow.array(
        [None if text is None else text.encode() for text in texts], pyarrow.binary()
    ),
    "null": lambda texts: pyarrow.nulls(len(texts)),
}


@given(texts=st.lists(st.none() | st.text(max_size=5), max_size=6), kind=st.sampled_from(list(TEXT_TYPES)))
def test_parquet(folder: Path, texts: list[str | None], kind: str) -> None:
    path = folder / "a.parquet"
    column = TEXT_TYPES[kind](texts)
    pyarrow.parquet.write_table(pyarrow.table({"n": range(len(texts)), "text": column}), path, row_group_size=2)
    reading = read(path, path.read_bytes())
    assert reading.error is None
    assert reading.documents == [text for text in texts if text and text.strip() and kind != "null"]
    assert len(reading.documents) + reading.num_skipped == max(len(texts), 1)


@given(start=st.integers(0, 600), wrong=st.binary(min_size=1, max_size=4), is_cut=st.booleans())
def test_damaged_parquet(folder: Path, start: int, wrong: bytes, is_cut: bool) -> None:
    path = folder / "a.parquet"
    table = pyarrow.table({"text": ["one", "two", None], "n": [1, 2, 3]})
    pyarrow.parquet.write_table(table, path, write_page_checksum=True)
    content = path.read_bytes()
    start %= len(content)
    reading = read(path, content[:start] + wrong + (b"" if is_cut else content[start + len(wrong) :]))
    if reading.error:
        assert path.name in str(reading.error)
    else:
        assert not is_cut
        assert len(reading.documents) + reading.num_skipped > 0
