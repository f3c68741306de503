"""Compressed files: each kind is read as a stream, and what is damaged, doubly packed or an archive is refused."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from raptr_ds.errors import DataError
from raptr_ds.prepare.corpus import FileSource
from raptr_ds.prepare.input_files import file_sources
from raptr_ds.prepare.readers import ReadingCounts, ReadingOptions
from raptr_ds.prepare.streams import lines_of_file

SKIP = ReadingOptions(on_bad_text="skip")
LINES = [f"line {number * number} of {number}\n".encode() for number in range(9000)]
CONTENT = b"".join(LINES)
JSONL = b'{"text": "one"}\r\n{"text": "two"}\n'


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstd,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}
every_kind = pytest.mark.parametrize("suffix", PACK)


@every_kind
def test_lines_are_those_that_were_packed(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.txt{suffix}"
    packed = PACK[suffix](CONTENT)
    path.write_bytes(packed)
    assert list(lines_of_file(path)) == LINES
    path.write_bytes(packed + PACK[suffix](b"") + packed)  # as `cat` and parallel compressors join them
    assert list(lines_of_file(path)) == LINES * 2
    path.write_bytes(PACK[suffix](b""))
    assert list(lines_of_file(path)) == []


@every_kind
def test_the_content_decides_not_the_name(tmp_path: Path, suffix: str) -> None:
    for name in ("a.jsonl", "a.jsonl.gz", f"a.jsonl{suffix.upper()}"):
        (tmp_path / name).write_bytes(PACK[suffix](JSONL))
        assert list(FileSource(tmp_path / name, ReadingOptions()).documents(ReadingCounts())) == ["one", "two"]
    (sources, ignored) = file_sources([tmp_path], ReadingOptions())
    assert (len(sources), ignored.total()) == (3, 0)


@every_kind
@pytest.mark.parametrize(
    "options", [ReadingOptions("line"), ReadingOptions("line", on_bad_text="skip")], ids=["refuse", "skip"]
)
def test_damaged_files_are_refused_with_skip_too(tmp_path: Path, suffix: str, options: ReadingOptions) -> None:
    path = tmp_path / f"a.txt{suffix}"
    packed = PACK[suffix](CONTENT)
    middle = len(packed) // 2
    damaged = {
        "cut": packed[:-1],
        "half": packed[:middle],
        "a byte": packed[:1],
        "empty": b"",
        "overwritten": packed[:middle]
        + bytes(byte ^ 0xFF for byte in packed[middle : middle + 40])
        + packed[middle + 40 :],
        "second cut": packed + packed[:middle],
        "second overwritten": packed + packed[:20] + b"\xff" * 20 + packed[40:],
        "followed by something": packed + b"something",
        "not compressed": CONTENT,
    }
    for content in damaged.values():
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"cannot read .*a\.txt\{suffix} to its end: .*[Rr]eplace or remove"):
            list(FileSource(path, options).documents(ReadingCounts()))


def archives() -> dict[str, bytes]:
    text = b"some text\n" * 100
    member = tarfile.TarInfo("a.txt")
    member.size = len(text)
    made = {}
    for name, kind in {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}.items():
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=kind) as archive:
            archive.addfile(member, io.BytesIO(text))
        made[f"{name} tar"] = stream.getvalue()
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.txt", text)
    made["zip"] = stream.getvalue()
    stream = io.BytesIO()
    zipfile.ZipFile(stream, "w").close()
    made["empty zip"] = stream.getvalue()
    made["7z"] = b"7z\xbc\xaf\x27\x1c\0\4" + text
    made["rar"] = b"Rar!\x1a\x07\x01\0" + text
    made["lz4"] = b"\x04\x22\x4d\x18" + text
    made["lzma"] = lzma.compress(text, lzma.FORMAT_ALONE)
    return made


@pytest.mark.parametrize("kind", archives())
def test_archives_are_refused_also_inside_a_stream(tmp_path: Path, kind: str) -> None:
    archive = archives()[kind]
    for name, content in {"a.txt": archive, **{f"a{suffix}": pack(archive) for suffix, pack in PACK.items()}}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="not text: unpack it first"):
            list(FileSource(tmp_path / name, SKIP).documents(ReadingCounts()))


@every_kind
def test_two_layers_are_refused(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(PACK[suffix](CONTENT)))
    with pytest.raises(DataError, match="data inside gzip data, not text: unpack it first"):
        list(lines_of_file(tmp_path / "a.txt.gz"))


@every_kind
def test_parquet_by_other_names_is_refused(tmp_path: Path, suffix: str) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one"]}), tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.jsonl").write_bytes(content)
    for name, match in (
        ("a.jsonl", r"Parquet file: give it a name"),
        (f"a.parquet{suffix}", "Parquet.*unpack it first"),
    ):
        (tmp_path / name).write_bytes(content if name == "a.jsonl" else PACK[suffix](content))
        with pytest.raises(DataError, match=match):
            list(FileSource(tmp_path / name, SKIP).documents(ReadingCounts()))
    (tmp_path / "b.parquet").write_bytes(archives()["zip"])
    with pytest.raises(DataError, match="zip archive, not text: unpack it first"):
        file_sources([tmp_path / "b.parquet"], ReadingOptions())


@pytest.mark.parametrize(
    "text", ["PK is a name", "PAR1 genes", "7z", "BZh9", "Rar!", "]\0\0", "\x1fa", "x" * 257 + "ustar  \0"]
)
def test_text_that_begins_a_little_like_an_archive_is_text(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text(text)
    assert list(FileSource(path, ReadingOptions()).documents(ReadingCounts())) == [text]
