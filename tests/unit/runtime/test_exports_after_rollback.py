"""What a rollback does to exports: work on later steps ends, their folders are set aside, earlier ones stay."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raptr_ds.checkpoint.manager import SaveReport
from raptr_ds.runtime.exports import EXPORTS, Exports
from raptr_ds.runtime.side_process import Ended


class _Process:
    """A tool that runs until it is ended by the test."""

    def __init__(self) -> None:
        self.end: Ended | None = None
        self.is_stopped = False

    def poll(self) -> Ended | None:
        return self.end

    def stop(self) -> None:
        self.is_stopped = True


class _Checkpoints:
    def __init__(self, folder: Path) -> None:
        self.folder, self.held = folder, set[int]()

    def release(self, step: int) -> None:
        self.held.discard(step)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> dict[int, _Process]:
    """The tools that were started, by their step."""
    started: dict[int, _Process] = {}

    def start(exports: Any, step: int) -> _Process:
        folder = exports._folder / f".unfinished-step-{step:08d}"
        folder.mkdir(exist_ok=True)
        started[step] = _Process()
        return started[step]

    monkeypatch.setattr(Exports, "_start_export", start)
    return started


def _save(exports: Exports, step: int) -> dict[str, str]:
    mark = exports.mark(step)
    exports.saved(SaveReport(step, None, 0.0, 0.0, 0))
    exports.poll()
    return mark


def _exports(tmp_path: Path) -> tuple[Exports, Any]:
    config: Any = SimpleNamespace(
        checkpoint=SimpleNamespace(export_interval=2, export_precision="fp32"),
        eval=SimpleNamespace(tasks=(), task_interval=None),
        train=SimpleNamespace(steps=100),
    )
    metrics: Any = SimpleNamespace(say=lambda _: None)
    events: Any = SimpleNamespace(record=lambda *_, **__: None)
    checkpoints: Any = _Checkpoints(tmp_path / "checkpoints")
    exports = Exports(config, tmp_path, checkpoints, metrics, events)
    exports.begin(0, is_own=True)
    return exports, checkpoints


@pytest.mark.usefixtures("processes")
def test_a_checkpoint_that_is_written_again_still_records_its_export(tmp_path: Path) -> None:
    exports, checkpoints = _exports(tmp_path)
    assert _save(exports, 2) == {"export": "plain"}
    assert _save(exports, 2) == {"export": "plain"}
    assert (exports.pending, checkpoints.held) == ("the export of step 2", {2})
    assert _save(exports, 3) == {}


def test_an_export_whose_checkpoint_is_written_again_begins_again(
    tmp_path: Path, processes: dict[int, _Process]
) -> None:
    """It reads the folder that the new checkpoint replaces."""
    exports, checkpoints = _exports(tmp_path)
    _save(exports, 2)
    reading = processes[2]
    exports.go_back(2)
    exports.poll()
    assert not reading.is_stopped
    _save(exports, 2)
    assert reading.is_stopped
    assert processes[2] is not reading
    processes[2].end = Ended(1.0, None)
    exports.poll()
    assert (exports.pending, checkpoints.held) == ("", set())
    assert (tmp_path / EXPORTS / "step-00000002").is_dir()


def test_a_rollback_whose_checkpoint_is_not_written_leaves_its_export_alone(
    tmp_path: Path, processes: dict[int, _Process]
) -> None:
    exports, checkpoints = _exports(tmp_path)
    _save(exports, 2)
    exports.go_back(2)
    assert exports.mark(2) == {"export": "plain"}
    exports.saved(SaveReport(2, "the disk is full", 0.0, 0.0, 0))
    assert checkpoints.held == {2}
    processes[2].end = Ended(1.0, None)
    exports.poll()
    assert (exports.pending, checkpoints.held) == ("", set())
    assert (tmp_path / EXPORTS / "step-00000002").is_dir()


def test_a_rollback_ends_later_work_and_sets_later_exports_aside(
    tmp_path: Path, processes: dict[int, _Process]
) -> None:
    exports, checkpoints = _exports(tmp_path)
    for step in (2, 4):
        _save(exports, step)
        processes[step].end = Ended(1.0, None)
        exports.poll()
    for step in (6, 8):
        _save(exports, step)
    assert sorted(processes) == [2, 4, 6]
    assert checkpoints.held == {6, 8}
    exports.go_back(2)
    assert processes[6].is_stopped
    assert (exports.pending, checkpoints.held) == ("", set())
    kept = tmp_path / EXPORTS
    assert sorted(path.name for path in kept.glob("step-*")) == ["step-00000002"]
    assert sorted(path.name for path in kept.glob("set-aside-*/step-*")) == ["step-00000004"]
    # The steps that are trained again are saved and exported again; that of the rollback itself is there.
    assert _save(exports, 2) == {"export": "plain"}
    assert exports.pending == ""
    assert _save(exports, 4) == {"export": "plain"}
    assert exports.pending == "the export of step 4"


def test_exports_whose_file_system_is_away_end_nothing(
    tmp_path: Path, processes: dict[int, _Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    exports, _ = _exports(tmp_path)
    stat, lines = Path.stat, list[str]()

    def away(path: Path, **how: Any) -> os.stat_result:
        if EXPORTS in path.parts:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return stat(path, **how)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", away)
        patch.setattr(exports._metrics, "say", lines.append)
        _save(exports, 2)
        exports.go_back(0)
    assert processes[2].is_stopped
    [line] = lines
    assert line.startswith("exports after step 0 stay where they are: ")
    assert os.strerror(errno.ESTALE) in line
