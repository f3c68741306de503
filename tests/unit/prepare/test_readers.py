"""Files to documents: every kind, what is refused and what is skipped and counted."""

import gzip
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from raptr_ds.errors import DataError
from raptr_ds.prepare.corpus import DatasetSource, FileSource
from raptr_ds.prepare.embedded import EmbeddedSource, documents_of_module
from raptr_ds.prepare.readers import LARGEST_DOCUMENT_BYTES, ReadingCounts, ReadingOptions

SKIP = ReadingOptions(on_bad_text="skip")


def read(path: Path, options: ReadingOptions = ReadingOptions()) -> tuple[list[str], dict[str, int]]:  # noqa: B008
    counts = ReadingCounts()
    return list(FileSource(path, options).documents(counts)), dict(counts.skipped)


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ("file", ["one\ntwo\n\nthree\n \nfour"]),
        ("paragraph", ["one\ntwo", "three", "four"]),
        ("line", ["one", "two", "three", "four"]),
    ],
)
def test_text_by_file_paragraph_and_line(tmp_path: Path, document: Any, expected: list[str]) -> None:
    content = "\ufeffone\r\ntwo\n\nthree\n \nfour\n".encode()
    plain, packed = tmp_path / "a.txt", tmp_path / "a.txt.gz"
    plain.write_bytes(content)
    packed.write_bytes(gzip.compress(content))
    assert read(plain, ReadingOptions(document))[0] == expected
    assert read(packed, ReadingOptions(document))[0] == expected


def test_a_huge_file_is_cut_at_line_ends(tmp_path: Path) -> None:
    line = "x" * 999 + "\n"
    (tmp_path / "a.txt").write_text(line * 9000)
    documents, _ = read(tmp_path / "a.txt")
    assert len(documents) == 3
    assert max(map(len, documents)) <= LARGEST_DOCUMENT_BYTES
    assert "\n".join(documents) + "\n" == line * 9000


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_bad_text_is_refused_or_counted(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=rf"{name}.*not UTF-8.*--on-bad-text skip"):
        read(path)
    assert read(path, SKIP) == ([], {"not UTF-8 text": 1})


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [
        json.dumps(row) for row in ({"text": "one"}, {"text": None}, {"text": ""}, {"text": "a\ud800"}, {"text": 5})
    ]
    path.write_text("\n".join([*rows, "{broken", "[1]", "", json.dumps({"text": "two\nlines"})]))
    documents, skipped = read(path, SKIP)
    assert documents == ["one", "two\nlines"]
    assert sum(skipped.values()) == 6
    assert skipped["empty"] == 2
    with pytest.raises(DataError, match=r"a\.jsonl line 4: not UTF-8 text"):
        read(path)
    with pytest.raises(DataError, match=r"no key 'texts'; did you mean 'text'"):
        read(path, ReadingOptions(text_key="texts"))


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["one", None, "two", " "], "body": [b"1", b"\xff", b"3", b"4"], "n": [1, 2, 3, 4]})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    assert read(path) == (["one", "two"], {"empty": 2})
    assert read(path, ReadingOptions(text_key="body", on_bad_text="skip")) == (["1", "3", "4"], {"not UTF-8 text": 1})
    with pytest.raises(DataError, match=r"row 1: not UTF-8"):
        read(path, ReadingOptions(text_key="body"))
    with pytest.raises(DataError, match=r"no column 'txt'; did you mean 'text'.*it has text, body, n"):
        read(path, ReadingOptions(text_key="txt"))
    with pytest.raises(DataError, match=r"column 'n' .* holds int64, not text"):
        read(path, ReadingOptions(text_key="n"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="as Parquet"):
        read(path)


def test_text_in_parquet_that_is_not_utf8(tmp_path: Path) -> None:
    wrong = pyarrow.Array.from_buffers(
        pyarrow.string(),
        2,
        [None, pyarrow.array([0, 2, 4], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"ok\xff\xfe")],
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": wrong}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", SKIP) == (["ok"], {"not UTF-8 text": 1})


def test_truncated_gzip_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"some text\n" * 1000)[:-15])
    with pytest.raises(DataError, match="to its end"):
        read(tmp_path / "a.txt.gz")


def test_a_dataset_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, config: str | None, split: str, streaming: bool) -> list[dict[str, str]]:
        if name != "known":
            raise FileNotFoundError("no such dataset")
        assert (config, split, streaming) == ("en", "train", True)
        return [{"text": "one"}, {"text": ""}, {"text": "two"}]

    module: ModuleType = SimpleNamespace(load_dataset=load_dataset)  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "datasets", module)
    source = DatasetSource("known", "en", "train", ReadingOptions())
    assert list(source.documents(ReadingCounts())) == ["one", "two"]
    with pytest.raises(DataError, match="cannot load the dataset other/train: FileNotFoundError"):
        list(DatasetSource("other", None, "train", ReadingOptions()).documents(ReadingCounts()))
    with pytest.raises(DataError, match="row 0 has no key 'txt'; did you mean 'text'"):
        list(DatasetSource("known", "en", "train", ReadingOptions(text_key="txt")).documents(ReadingCounts()))


def test_docstrings_are_read_without_importing(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(
        '"""Module."""\nraise SystemExit\ndef f():\n    """Do\n    it."""\nclass C:\n    x = "no"\n'
    )
    assert documents_of_module(tmp_path / "m.py") == ["Module.\n\nDo\nit."]
    (tmp_path / "m.py").write_text("template {{ x }}")
    assert documents_of_module(tmp_path / "m.py") == []


def test_the_embedded_corpus_is_real_text(monkeypatch: pytest.MonkeyPatch) -> None:
    library = [path for path in EmbeddedSource().files if path.parent.name in ("json", "pydoc_data")]
    monkeypatch.setattr(EmbeddedSource, "files", [*library, *library[:2]])
    counts = ReadingCounts()
    documents = list(EmbeddedSource().documents(counts))
    assert len(documents) == len(set(documents)) > 50
    assert counts.skipped["duplicate"] >= 2  # pydoc_data.topics has copies of its own
    assert sum(map(len, documents)) > 300_000
    assert any("JSON (JavaScript Object Notation)" in document for document in documents)
    assert list(EmbeddedSource(workers=1).documents(ReadingCounts())) == documents


def test_all_of_the_standard_library_is_found_without_its_tests() -> None:
    files = EmbeddedSource().files
    assert len(files) > 400
    assert not any({"test", "tests", "site-packages"} & set(path.parts[-3:-1]) for path in files)
    assert {"argparse.py", "textwrap.py"} <= {path.name for path in files}
