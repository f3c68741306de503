"""Files to documents: every kind, what is refused and what is skipped and counted."""

import gzip
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from raptr_ds.errors import DataError
from raptr_ds.prepare import embedded
from raptr_ds.prepare.corpus import DatasetSource, FileSource
from raptr_ds.prepare.embedded import EmbeddedSource, documents_of_module
from raptr_ds.prepare.readers import LARGEST_DOCUMENT_BYTES, ReadingCounts, ReadingOptions, parse_row

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


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_the_place_of_bad_text_is_where_it_is(tmp_path: Path, mark: bytes) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(mark + b"x" * 9 + b"\n\nabc\xe9d\n")
    for document, place in [("file", len(mark) + 14), ("paragraph", 3), ("line", 3)]:
        number = {"file": "", "paragraph": r" \(paragraph 2\)", "line": r" \(line 3\)"}[document]
        with pytest.raises(DataError, match=rf"a\.txt{number}: not UTF-8 text \(byte 0xe9 at {place}\)"):
            read(path, ReadingOptions(document))  # type: ignore[arg-type]
    path.write_bytes(mark + (b"x" * 999 + b"\n") * 5000 + b"\xe9")  # more than one document
    with pytest.raises(DataError, match=rf"\(byte 0xe9 at {len(mark) + 5_000_000}\)"):
        read(path)
    assert parse_row(mark + b'{"a": "\xe9"}') == f"not UTF-8 text (byte 0xe9 at {len(mark) + 7})"


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
    with pytest.raises(DataError, match=r"line 1 has no key 'texts'; did you mean 'text'.*skip to leave such rows out"):
        read(path, ReadingOptions(text_key="texts"))


BAD_ROWS = {
    "digits": ('{"text": "a", "id": ' + "9" * 5000 + "}", "a number that is too long"),
    "nesting": ('{"text": "a", "tree": ' + "[" * 99_999 + "]" * 99_999 + "}", "nested too deeply"),
    "key twice": ('{"text": "a", "text": "b"}', r"a key that stands twice \('text'"),
    "escaped key twice": ('{"text": "a", "te\\u0078t": "b"}', r"a key that stands twice \('text'"),
    "other key twice": ('{"id": 1, "text": "a", "id": 1}', r"a key that stands twice \('id'"),
    "half a pair": ('{"text": "a\\ud800"}', "not UTF-8 text"),
    "NaN as text": ('{"text": NaN}', "not text but float"),
    "1e400 as text": ('{"text": 1e400}', "not text but float"),
    "list as text": ('{"text": ["a"]}', "not text but list"),
    "two objects": ('{"text": "a"}{"text": "b"}', "not JSON"),
    "no object": ('"text"', "not a JSON object"),
    "control character": ('{"text": "a\tb"}', "not JSON"),
}


@pytest.mark.parametrize(("row", "problem"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_refused_by_line_or_counted(tmp_path: Path, row: str, problem: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "one"}}\n{row}\n{{"text": "two"}}\n')
    with pytest.raises(DataError, match=rf"a\.jsonl line 2: (JSON .*)?{problem}"):
        read(path)
    documents, skipped = read(path, SKIP)
    assert documents == ["one", "two"]
    assert list(skipped.values()) == [1]


def test_rows_that_look_bad_but_are_not(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [
        '\ufeff{"text": "mark"}\r',
        '{"text": "numbers", "a": NaN, "b": 1e400, "c": -Infinity, "d": ' + "9" * 4300 + "}",
        '{"text": "keys in parts", "a": {"b": 1, "b": 2}, "b": {"text": "x", "text": "y"}}',
        '{"text": "a pair \\ud83d\\ude00", "other": "half \\ud83d"}\r',
        '{"text": "levels", "tree": ' + "[" * 400 + "]" * 400 + "}",
        '\ufeff{"text": "mark of a file that was appended \u2028 \x85"}',
        " \t\r",
    ]
    path.write_text("\n".join(rows), newline="")
    documents, skipped = read(path)
    assert documents[:3] == ["mark", "numbers", "keys in parts"]
    assert documents[3:] == ["a pair 😀", "levels", "mark of a file that was appended \u2028 \x85"]
    assert skipped == {}


def test_rows_without_the_key_are_counted_unless_none_has_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"meta": 1}\n{"text": "one"}\n{}\n')
    assert read(path, SKIP) == (["one"], {"without the key 'text'": 2})
    with pytest.raises(DataError, match="line 1 has no key 'text'; it has meta"):
        read(path)
    with pytest.raises(DataError, match=r"no row of .*a\.jsonl has the key 'body'; it has meta\. Name the one"):
        read(path, ReadingOptions(text_key="body", on_bad_text="skip"))
    path.write_text(json.dumps({f"key{number}": 1 for number in range(500)}))
    with pytest.raises(DataError, match=r"key0, .*key19 and 480 more\."):
        read(path, SKIP)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_file_without_anything_is_counted(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("")
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    assert read(path) == ([], {"empty files": 1})


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


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.binary(),
        pyarrow.large_binary(),
        pyarrow.binary_view(),
        pyarrow.dictionary(pyarrow.int8(), pyarrow.string()),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.large_string()),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.binary()),
    ],
    ids=str,
)
def test_every_type_of_text_in_parquet_is_text(tmp_path: Path, kind: pyarrow.DataType) -> None:
    values = pyarrow.array(["eins", None, "zwei", "", "é"], getattr(kind, "value_type", kind))
    column = values.dictionary_encode() if pyarrow.types.is_dictionary(kind) else values
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet", row_group_size=2)
    stored = pyarrow.parquet.read_schema(tmp_path / "a.parquet").field("text").type
    assert str(stored).partition("<")[0] == str(kind).partition("<")[0]
    assert read(tmp_path / "a.parquet") == (["eins", "zwei", "é"], {"empty": 2})


def test_parquet_columns_that_are_not_one_column_of_text(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"list": [["a"]], "part": [{"text": "a"}], "a.b": ["dots"], "none": pyarrow.nulls(1)})
    pyarrow.parquet.write_table(table, path)
    for column in ("list", "part"):
        with pytest.raises(DataError, match=rf"column '{column}' of .* holds .*, not text"):
            read(path, ReadingOptions(text_key=column))
    assert read(path, ReadingOptions(text_key="a.b")) == (["dots"], {})
    assert read(path, ReadingOptions(text_key="none")) == ([], {"empty": 1})
    with pytest.raises(DataError, match=r"has no column 'text'.*; it has list, part, a\.b, none"):
        read(path, SKIP)
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([["a"], ["b"]], ["text", "text"]), path)
    with pytest.raises(DataError, match="has 2 columns 'text'"):
        read(path)


def test_text_in_parquet_that_is_not_utf8(tmp_path: Path) -> None:
    wrong = pyarrow.Array.from_buffers(
        pyarrow.string(),
        2,
        [None, pyarrow.array([0, 2, 4], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"ok\xff\xfe")],
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": wrong}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", SKIP) == (["ok"], {"not UTF-8 text": 1})


def test_a_dataset_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, config: str | None, split: str, streaming: bool) -> list[dict[str, str]]:
        if name != "known":
            raise FileNotFoundError("no such dataset")
        assert (config, split, streaming) == ("en", "train", True)
        return [{"text": "one"}, {"text": ""}, {"text": "two"}, {"meta": "three"}, {"text": None}]

    module: ModuleType = SimpleNamespace(load_dataset=load_dataset)  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "datasets", module)
    counts = ReadingCounts()
    assert list(DatasetSource("known", "en", "train", SKIP).documents(counts)) == ["one", "two"]
    assert counts.skipped == {"empty": 2, "without the key 'text'": 1}
    with pytest.raises(DataError, match="known/en/train row 3 has no key 'text'; it has meta"):
        list(DatasetSource("known", "en", "train", ReadingOptions()).documents(ReadingCounts()))
    with pytest.raises(DataError, match="cannot load the dataset other/train: FileNotFoundError"):
        list(DatasetSource("other", None, "train", ReadingOptions()).documents(ReadingCounts()))
    with pytest.raises(DataError, match=r"no row of known/en/train has the key 'txt'.*; it has text"):
        list(DatasetSource("known", "en", "train", ReadingOptions("file", "txt", "skip")).documents(ReadingCounts()))
    with pytest.raises(DataError, match="row 0 has no key 'txt'; did you mean 'text'"):
        list(DatasetSource("known", "en", "train", ReadingOptions(text_key="txt")).documents(ReadingCounts()))


def test_a_folder_of_a_dataset_is_another_one_after_a_change(tmp_path: Path) -> None:
    def fingerprint() -> str:
        return DatasetSource(str(tmp_path), None, "train", SKIP).fingerprint()

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "one"}\n')
    first = fingerprint()
    assert fingerprint() == first
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "one, changed"}\n')
    second = fingerprint()
    (tmp_path / "data" / "more.jsonl").write_text('{"text": "two"}\n')
    assert len({first, second, fingerprint()}) == 3


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


def test_a_link_to_nothing_is_no_python_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.py").write_text('"""Text."""')
    (tmp_path / ".#m.py").symlink_to("user@host.123")  # how Emacs marks a file that is being edited
    monkeypatch.setattr(embedded.sysconfig, "get_path", lambda name: str(tmp_path))
    source = EmbeddedSource()
    assert source.fingerprint()
    assert list(source.documents(ReadingCounts())) == ["Text."]


def dies(path: Path) -> list[str]:
    os._exit(9)


def test_a_worker_that_dies_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "documents_of_module", dies)
    monkeypatch.setattr(EmbeddedSource, "files", [Path("a.py")])
    with pytest.raises(DataError, match="a worker process died, most likely because memory ran out"):
        list(EmbeddedSource(workers=2).documents(ReadingCounts()))


def test_all_of_the_standard_library_is_found_without_its_tests() -> None:
    files = EmbeddedSource().files
    assert len(files) > 400
    assert not any({"test", "tests", "site-packages"} & set(path.parts[-3:-1]) for path in files)
    assert {"argparse.py", "textwrap.py"} <= {path.name for path in files}
