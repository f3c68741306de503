"""Weights & Biases and MLflow, by fakes of their documented interface: what they get, outages, and resumes."""

import io
import json
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from raptr_ds.config.sections import LogSection
from raptr_ds.errors import ConfigError
from raptr_ds.runtime import tracking
from raptr_ds.runtime.metrics import Metrics
from raptr_ds.runtime.progress import PlainProgress
from raptr_ds.runtime.tracking import TrackerSink, open_trackers
from tests.trackers import Absent, Server, install
from tests.unit.runtime.test_metrics import lines_of, training_step

SECTIONS: dict[str, dict[str, Any]] = {
    "wandb": {"project": "raptr"},
    "mlflow": {"experiment": "raptr", "tracking_uri": "http://tracking:5000"},
}
BOTH = pytest.mark.parametrize("kind", list(SECTIONS))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    """A tracking server that both packages reach, and quick second attempts."""
    found = Server()
    install(monkeypatch, found)
    monkeypatch.setattr(tracking, "_FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(tracking, "_LONGEST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(tracking, "_CLOSE_SECONDS", 5.0)
    return found


def sink_of(kind: str, folder: Path, resume_step: int = 0, **more: Any) -> TrackerSink:
    log = LogSection.model_validate({kind: {**SECTIONS[kind], **more}})
    (sink,) = open_trackers(log, folder, resume_step)
    return sink


def line(step: int) -> dict[str, Any]:
    return {"step": step, "loss": step / 4, "mfu": None, "path": [0, 1], "lr": 0.5}


def until(holds: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@BOTH
def test_numbers_arrive_by_name_and_in_order(kind: str, server: Server, tmp_path: Path) -> None:
    sink = sink_of(kind, tmp_path)
    for step in range(1, 50):
        sink.record(line(step))
    sink.record({"step": 49, "eval_loss": 0.25, "path_length": 6})
    sink.close()
    steps = [(step, {"train/loss": step / 4, "train/learning_rate": 0.5}) for step in range(1, 50)]
    assert server.of("log") == [*steps, (49, {"eval/loss_of_6_layers": 0.25})]
    assert server.calls[-1][0] == {"wandb": "finish", "mlflow": "end_run"}[kind]
    assert sink.failure is None
    assert len(server.threads) == 1  # MLflow keeps its active run by thread


def test_what_the_packages_are_asked(server: Server, tmp_path: Path) -> None:
    sink = sink_of("wandb", tmp_path / "bert", mode="offline", entity="team")
    sink.record(line(1))
    sink.close()
    (asked,) = server.of("init")
    assert len(asked.pop("id")) == 8
    assert asked == {
        "entity": "team", "project": "raptr", "dir": str(tmp_path / "bert"), "name": "bert", "group": None,
        "mode": "offline", "resume": "allow",
    }  # fmt: skip
    server.calls.clear()
    sink = sink_of("mlflow", tmp_path / "bert", name="first")
    sink.record(line(1))
    sink.close()
    assert server.calls[:3] == [
        ("set_tracking_uri", "http://tracking:5000"),
        ("set_experiment", "raptr"),
        ("start_run", {"run_id": None, "run_name": "first"}),
    ]


def run_id(kind: str, server: Server) -> str:
    """Return the id of the run that was begun or continued last."""
    return server.of("init")[-1]["id"] if kind == "wandb" else server.of("start_run")[-1]["run_id"]


def test_mlflow_gets_no_name_that_it_refuses(server: Server, tmp_path: Path) -> None:
    sink = sink_of("mlflow", tmp_path)
    sink.record({"step": 3, "tasks": {"gsm8k@5": {"exact_match,strict-match": 0.5}}})
    sink.close()
    assert server.of("log") == [(3, {"tasks/gsm8k_5/exact_match_strict-match": 0.5})]


@BOTH
def test_scores_of_an_earlier_step_are_not_lost(kind: str, server: Server, tmp_path: Path) -> None:
    sink = sink_of(kind, tmp_path)
    sink.record(line(9))
    scores = {"boolq": {"shots": 0, "acc": 0.5, "acc_stderr": 0.1, "f1": None}}
    sink.record({"step": 4, "tasks": scores})
    sink.close()
    values = {"tasks/boolq/acc": 0.5, "tasks/boolq/acc_stderr": 0.1}
    if kind == "mlflow":
        assert server.of("log")[1:] == [(4, values)]
    else:  # which would ignore step 4
        assert server.of("log_more") == [{**values, "tasks/step": 4}]
        assert server.of("define_metric") == [("tasks/*", "tasks/step")]


@BOTH
def test_a_resume_continues_the_same_run_and_a_new_run_does_not(kind: str, server: Server, tmp_path: Path) -> None:
    ids = []
    for resume_step in (0, 5, 7, 0, 3):
        sink = sink_of(kind, tmp_path, resume_step)
        sink.record(line(resume_step + 1))
        sink.close()
        ids.append(run_id(kind, server) or json.loads((tmp_path / f"tracking_{kind}.json").read_text())["id"])
    assert ids[0] == ids[1] == ids[2] != ids[3] == ids[4]


@BOTH
def test_a_folder_that_was_moved_is_its_run_and_a_copy_is_another(kind: str, server: Server, tmp_path: Path) -> None:
    def resumed(folder: Path) -> str:
        sink = sink_of(kind, folder, 5)
        sink.record(line(6))
        sink.close()
        return json.loads((folder / f"tracking_{kind}.json").read_text())["id"]

    first, moved, copy, later = (tmp_path / name for name in ("first", "moved", "copy", "later"))
    first.mkdir()
    begun = resumed(first)
    first.rename(moved)
    assert resumed(moved) == begun
    shutil.copytree(moved, copy)
    branch = resumed(copy)
    assert branch != begun
    assert (resumed(moved), resumed(copy)) == (begun, branch)
    copy.rename(later)
    first.mkdir()  # where the first one was, another has begun
    assert resumed(first) not in (begun, branch)
    assert (resumed(moved), resumed(later)) == (begun, branch)


@BOTH
def test_a_resume_elsewhere_begins_a_new_run_there(kind: str, server: Server, tmp_path: Path) -> None:
    ids = []
    for where in ("raptr", "another"):
        sink = sink_of(kind, tmp_path, 5, **{{"wandb": "project", "mlflow": "experiment"}[kind]: where})
        sink.record(line(6))
        sink.close()
        ids.append(json.loads((tmp_path / f"tracking_{kind}.json").read_text())["id"])
    assert ids[0] != ids[1]


def test_a_resume_with_another_server_in_the_environment_begins_a_new_run(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The server does not know a run of another one. Another password is the same server, and is not written down."""
    ids = []
    for address in ("a:old-secret@first:5000", "a:new-secret@first:5000", "a:new-secret@second:5000"):
        monkeypatch.setattr("mlflow.get_tracking_uri", lambda uri=f"http://{address}/x": uri)
        sink = sink_of("mlflow", tmp_path, 5, tracking_uri=None)
        sink.record(line(6))
        sink.close()
        kept = (tmp_path / "tracking_mlflow.json").read_text()
        assert "secret" not in kept
        ids.append(json.loads(kept)["id"])
    assert ids[0] == ids[1] != ids[2]


@BOTH
@pytest.mark.parametrize("damage", ["", "[]", "{", "{}", pytest.param("[" * 100_000, id="deep")])
def test_a_damaged_tracking_file_begins_a_new_run(kind: str, damage: str, server: Server, tmp_path: Path) -> None:
    (tmp_path / f"tracking_{kind}.json").write_text(damage)
    sink = sink_of(kind, tmp_path, 5)
    sink.record(line(6))
    sink.close()
    assert [step for step, _ in server.of("log")] == [6]


@BOTH
@pytest.mark.parametrize("is_away_at_start", [True, False])
def test_an_outage_delays_records_only(kind: str, is_away_at_start: bool, server: Server, tmp_path: Path) -> None:
    server.is_away = is_away_at_start
    sink = sink_of(kind, tmp_path)
    sink.record(line(1))
    until(lambda: sink.failure if is_away_at_start else server.of("log"))
    server.is_away = True
    for step in range(2, 20):
        sink.record(line(step))
    until(lambda: sink.failure)
    assert sink.failure is not None
    assert sink.failure.endswith(": the server is away")
    server.is_away = False
    until(lambda: len(server.of("log")) == 19)
    until(lambda: sink.failure is None)
    sink.close()
    assert [step for step, _ in server.of("log")] == list(range(1, 20))


@BOTH
def test_a_server_that_does_not_answer_holds_nothing_up(
    kind: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_CLOSE_SECONDS", 0.2)
    server.answers.clear()
    progress = io.StringIO()
    started = time.monotonic()
    sinks = open_trackers(LogSection.model_validate({kind: SECTIONS[kind]}), tmp_path, 0)
    metrics = Metrics(tmp_path, num_steps=9, sinks=sinks, progress=PlainProgress(progress))
    for step in range(1, 10):
        metrics.record_step(training_step(step))
    metrics.sync()
    assert metrics.finish_writing() is None  # the run is complete: metrics.jsonl has all
    metrics.close()
    assert time.monotonic() - started < 3
    assert [line["step"] for line in lines_of(tmp_path)] == list(range(1, 10))
    assert "no answer within 0.2 s: it has not all of the run's metrics; metrics.jsonl has" in progress.getvalue()
    server.answers.set()


@BOTH
def test_a_run_that_ends_during_an_outage_says_so_and_is_complete(kind: str, server: Server, tmp_path: Path) -> None:
    server.is_away = True
    progress = io.StringIO()
    sinks = open_trackers(LogSection.model_validate({kind: SECTIONS[kind]}), tmp_path, 0)
    with closing(Metrics(tmp_path, num_steps=2, sinks=sinks, progress=PlainProgress(progress))) as metrics:
        metrics.record_step(training_step(1))
        until(lambda: sinks[0].failure)
        metrics.record_step(training_step(2))
        assert metrics.finish_writing() is None
    name = {"wandb": "Weights & Biases", "mlflow": "MLflow"}[kind]
    assert progress.getvalue().count(f"metrics cannot be written ({name}: the server is away)") == 1
    assert f"{name}: the server is away: it has not all of the run's metrics" in progress.getvalue()


@BOTH
def test_a_rollback_drops_what_waits(kind: str, server: Server, tmp_path: Path) -> None:
    server.is_away = True
    sink = sink_of(kind, tmp_path)
    for step in range(1, 9):
        sink.record(line(step))
    sink.rewind(3)
    sink.record(line(4))
    server.is_away = False
    sink.close()
    assert [step for step, _ in server.of("log")] == [1, 2, 3, 4]


@BOTH
def test_a_missing_package_is_named(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, kind, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Absent(kind), *sys.meta_path])
    with pytest.raises(ConfigError, match=rf"raptr_ds\.log\.{kind} needs the {kind} package.*pip install {kind}"):
        sink_of(kind, tmp_path)


def test_nothing_is_imported_that_was_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in SECTIONS:
        monkeypatch.delitem(sys.modules, kind, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Absent(*SECTIONS), *sys.meta_path])
    assert open_trackers(LogSection(), tmp_path, 0) == []
