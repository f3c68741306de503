"""Tasks from a user's files: kinds and columns found out, held-out rows, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from raptr_ds.errors import ConfigError, DataError
from raptr_ds.finetuning.examples import hold_out
from raptr_ds.finetuning.local_task import LocalOptions, load_local
from raptr_ds.finetuning.task import Columns
from tests.unit.finetuning.conftest import sentences, write

CONTEXT = "A cat sat on the mat."
QA = {"id": "1", "question": "Where?", "context": CONTEXT, "answers": {"text": ["the mat"], "answer_start": [13]}}


def load(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl", **options: Any):
    return load_local(write(folder / name, rows), LocalOptions(**options))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_a_text_and_its_label(tmp_path: Path, name: str) -> None:
    task, data = load(tmp_path, sentences(40), name)
    assert (task.name, task.kind, task.columns) == ("rows", "classification", Columns())
    assert data.labels == ("no", "yes")
    assert len(data.validation) == 4
    assert {(one.text, data.labels[int(one.label)]) for one in (*data.train, *data.validation)} == {
        (row["text"], row["label"]) for row in sentences(40)
    }


def test_pairs_scores_and_numbered_classes(tmp_path: Path) -> None:
    pairs = [{"sentence1": "a", "sentence2": str(i), "label": i % 3 * 5} for i in range(30)]
    task, data = load(tmp_path, pairs, "a.csv")
    assert (task.kind, task.columns) == ("classification", Columns("sentence1", "sentence2"))
    assert data.labels == ("0", "5", "10")  # as numbers, not as texts
    scores = [{"text": str(i), "label": i / 2} for i in range(30)]
    for name in ("b.csv", "b.jsonl"):
        task, data = load(tmp_path, scores, name)
        assert (task.kind, task.metrics) == ("regression", ("pearson", "spearmanr"))
        assert sorted(one.label for one in (*data.train, *data.validation)) == [i / 2 for i in range(30)]
    task, _ = load(tmp_path, [{"text": str(i), "label": i} for i in range(30)], "c.jsonl", kind="regression")
    assert task.kind == "regression"
    signs = [{"text": str(i), "label": (-1) ** i} for i in range(30)]
    for name in ("d.csv", "d.jsonl"):
        assert load(tmp_path, signs, name)[1].labels == ("-1", "1")
    names = [{"text": str(i), "label": ["--1", "1", "-"][i % 3]} for i in range(30)]
    assert load(tmp_path, names, "e.csv")[1].labels == ("-", "--1", "1")  # as texts


def test_quotation_marks_in_tsv_are_text(tmp_path: Path) -> None:
    texts = ['"to be', 'or not"', '"a"', *[f'{number}" long' for number in range(9)]]
    rows = [f"{text}\t{number % 2}\n" for number, text in enumerate(texts)]
    (tmp_path / "a.tsv").write_text("text\tlabel\n" + "".join(rows), encoding="utf-8")
    _, data = load_local(tmp_path / "a.tsv", LocalOptions())
    assert {one.text for one in (*data.train, *data.validation)} == set(texts)


def test_choices_and_answers(tmp_path: Path) -> None:
    task, data = load(tmp_path, [{"text": str(i), "choices": ["x", "y"], "label": i % 2} for i in range(9)])
    assert task.kind == "multiple-choice"
    assert data.train[0].choices == ("x", "y")
    numbered = [{"premise": str(i), "choice1": "x", "choice2": "y", "label": i % 2} for i in range(9)]
    task, data = load(tmp_path, numbered, "b.csv")
    assert (task.columns.text, task.columns.choices) == ("premise", ("choice1", "choice2"))
    assert data.validation[0].choices == ("x", "y")
    task, data = load(tmp_path, [{**QA, "question": str(i)} for i in range(9)], "c.jsonl")
    assert task.kind == "question-answering"
    assert (data.train[0].pair, data.train[0].start, data.train[0].answers) == (CONTEXT, 13, ("the mat",))


def test_choices_of_another_kind_are_not_looked_at(tmp_path: Path) -> None:
    rows = [{**row, "choices": [None, 5, "x"][i % 3]} for i, row in enumerate(sentences(9))]
    _, data = load(tmp_path, rows, kind="classification")
    assert {one.choices for one in (*data.train, *data.validation)} == {()}


def test_labels_of_digits_have_one_order(tmp_path: Path) -> None:
    """Names of the same number do not depend on the order of a set, nor long ones on what int() takes."""
    names = ["1", "9" * 5000, "0002", "01", "002", "02", "2", "001"]
    _, data = load(tmp_path, [{"text": str(i), "label": names[i % 8]} for i in range(64)])
    assert data.labels == ("001", "01", "1", "0002", "002", "02", "2", "9" * 5000)
    assert load(tmp_path, [{"text": str(i), "label": 10**400 + i % 2} for i in range(9)])[0].kind == "classification"


def test_named_columns_and_a_validation_file(tmp_path: Path) -> None:
    rows = [{"id": i, "body": f"t{i}", "title": f"p{i}", "stars": i % 2} for i in range(10)]
    other = write(tmp_path / "other.csv", rows[:3])
    task, data = load(tmp_path, rows, text="body", pair="title", label="stars", validation=other)
    assert task.columns == Columns("body", "title", "stars")
    assert [one.text for one in data.validation] == ["t0", "t1", "t2"]
    assert len(data.train) == 10


def test_copies_of_a_text_are_held_out_together() -> None:
    rows = [{"text": f"t{i % 7}", "label": i % 2} for i in range(70)]
    for fraction in (0.05, 0.3, 0.5):
        train, held_out = hold_out(rows, lambda row: row["text"], fraction)
        assert len(train) + len(held_out) == 70
        assert not {row["text"] for row in train} & {row["text"] for row in held_out}
        assert len(held_out) >= round(70 * fraction)
        assert hold_out(rows, lambda row: row["text"], fraction) == (train, held_out)


def test_a_json_array_and_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(sentences(20)), encoding="utf-8")
    assert len(load_local(tmp_path / "a.json", LocalOptions())[1].train) == 18
    (tmp_path / "b.csv").write_text('text,label\n"a, b\nc\u2028d",1\nx,0\ny,0\n', encoding="utf-8")
    _, data = load_local(tmp_path / "b.csv", LocalOptions(fraction=0.4))
    assert {one.text for one in (*data.train, *data.validation)} == {"a, b\nc\u2028d", "x", "y"}


BAD: list[tuple[list[dict[str, Any]], dict[str, Any], list[str]]] = [
    ([{"body": "a", "label": 1}], {}, ["'body', 'label'", "--text-column"]),
    ([{"text": "a", "class": 1}], {}, ["'text', 'class'", "--label-column"]),
    (sentences(4), {"text": "txt"}, ["'txt'", "'text', 'label'", "--text-column"]),
    (sentences(4), {"pair": "other"}, ["'other'", "--pair-column"]),
    ([{"text": str(i), "label": "same"} for i in range(9)], {}, ["same label, same", "nothing to learn"]),
    ([*sentences(9), {"text": "a", "label": None}], {}, ["row 10", "no label"]),
    ([*sentences(9), {"text": None, "label": "no"}], {}, ["'text'", "must be a text"]),
    (
        [{"text": str(i), "label": i or "x"} for i in range(9)],
        {"kind": "regression"},
        ["'x'", "finite number"],
    ),
    ([{"text": "a", "choices": ["x", "y"], "label": 2}] * 9, {}, ["from 0 to 1", "multiple-choice"]),
    ([{"text": "a", "choices": ["x"], "label": 0}] * 9, {}, ["list of two texts"]),
    ([{"text": str(i), "choices": ["x"] * (2 + i % 2), "label": 0} for i in range(9)], {}, ["2 or 3 choices"]),
    ([{**QA, "answers": {"text": ["mat"], "answer_start": [0]}}] * 2, {}, ["'mat'", "character 0", "'A c'"]),
    ([{**QA, "answers": "the mat"}] * 2, {}, ["answer_start"]),
    ([{**QA, "answers": {"text": ["mat"], "answer_start": [-4]}}] * 2, {}, ["'mat'", "character -4", "has ''"]),
    ([{**QA, "answers": {"text": [5], "answer_start": [0]}}] * 2, {}, ["answer 5", "'A'"]),
    ([{**QA, "answers": {"text": [" "], "answer_start": [5]}}] * 2, {}, ["blank answer, ' '"]),
    ([{"text": "a", "choices": ["x", None], "label": 0}] * 9, {}, ["None in column 'choices'", "a text"]),
    ([{"text": "a", "choice1": "x", "choice2": {}, "label": 0}] * 9, {}, ["{} in column 'choice2'", "a text"]),
    ([*sentences(9), {"text": float("nan"), "label": "no"}], {}, ["row 10", "nan in column 'text'", "a text"]),
    ([*sentences(9), {"text": "a", "label": float("nan")}], {}, ["row 10", "no label", "nan"]),
    ([*sentences(9), {"text": "a \ud83d", "label": "no"}], {}, ["row 10", "'\\ud83d'", "'text'", "surrogate"]),
    ([{"text": str(i), "label": ["a", "b"][: i % 3]} for i in range(9)], {}, ["row 1", "[]", "one label"]),
    (sentences(4), {"kind": "multiple-choice"}, ["'choices'", "'text', 'label'"]),
    (sentences(1), {}, ["leaves nothing to train on"]),
    ([{"text": str(i), "label": i / 2} for i in range(9)], {}, ["1 row for validation", "--validation-fraction"]),
]


@pytest.mark.parametrize(("rows", "options", "words"), BAD, ids=[" ".join(words)[:40] for *_, words in BAD])
def test_bad_rows(tmp_path: Path, rows: list[dict[str, Any]], options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises((ConfigError, DataError)) as caught:
        load(tmp_path, rows, **options)
    assert all(word in str(caught.value) for word in words), caught.value


def test_validation_that_does_not_fit(tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    for rows, words in (
        ([{"text": "a"}], ["other.jsonl", "'label'", "has 'text'"]),
        ([{"text": "a", "label": ""}], ["row 1", "other.jsonl", "no label", "training and in validation"]),
        ([{"text": "a", "label": "maybe"}], ["'maybe'", "no, yes"]),
    ):
        write(other, rows)
        with pytest.raises(DataError) as caught:
            load(tmp_path, sentences(20), validation=other)
        assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": 1}\n{"text"\n', ["line 2", "cannot be read as JSON"]),
        ("a.jsonl", "[1, 2]", ["row 1", "object"]),
        ("a.jsonl", "3\n", ["line 1", "object"]),
        ("a.jsonl", '{"text": "a", "label": 0, "label": 1}\n', ["line 1", "'label' stands twice"]),
        ("a.json", '[{"text": "a", "label": 0, "label": 1}]', ["'label' stands twice"]),
        ("a.jsonl", "\n", ["no rows"]),
        ("a.csv", "text,label\na,b,c\n", ["line 2", "another number of fields", "commas"]),
        ("a.tsv", "text\tlabel\na\tb\tc\n", ["line 2", "another number of fields", "tab"]),
        ("a.csv", "text,label,label\na,1,2\n", ["column 'label' twice"]),
        ("a.csv", 'text,label\n"a\n', ["no CSV"]),
        ("a.txt", "text", [".jsonl"]),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str, words: list[str]) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises((ConfigError, DataError)) as caught:
        load_local(tmp_path / name, LocalOptions())
    assert all(word in str(caught.value) for word in words), caught.value
