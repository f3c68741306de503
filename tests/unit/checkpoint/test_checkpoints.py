"""Saving and restoring in one process: during training, completely or not at all, and never from a damaged file."""

import contextlib
import errno
import os
import resource
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from raptr_ds.checkpoint import write as checkpoint_write
from raptr_ds.checkpoint.manager import check_writable
from raptr_ds.config.sections import ModelSection
from raptr_ds.errors import CheckpointError, Exit, StorageError
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.user_paths import PathError
from tests.unprivileged import closed

FILE = "rank-00000.safetensors"


def test_what_was_saved_comes_back(run: Any) -> None:
    run.engine.loss_scaler = {"cur_scale": 512.0}
    assert run.save(1, 2) == [None, None]
    assert run.restore() == 2
    fresh = run.new_engine()
    run.checkpoints.restore(fresh, "auto", run.model)
    assert fresh.loss_scaler == {"cur_scale": 512.0}


def test_nothing_saved_is_a_fresh_start(run: Any) -> None:
    assert run.restore() is None
    assert run.restore("none") is None


def test_layers_that_never_moved_have_no_state(run: Any) -> None:
    assert run.engine.tensors.keys() == {(name, "weight") for name in run.engine.shapes}
    run.checkpoints.save(run.engine, 1, run.model, {})
    run.checkpoints.wait()
    used = run.new_engine()
    used.step(4)
    assert run.checkpoints.restore(used, "auto", run.model) is not None
    assert used.tensors.keys() == run.engine.tensors.keys()
    assert used.counts == {}


def test_the_files_are_plain_safetensors(run: Any) -> None:
    run.save(3)
    tensors = load_file(run.folder / "step-00000003" / FILE)
    assert {tuple(tensor.shape) for tensor in tensors.values()} == {(28,), (24,), (6,)}
    assert sorted(path.name for path in (run.folder / "step-00000003").iterdir()) == ["manifest.json", FILE]


def test_the_last_few_are_kept(run: Any) -> None:
    run.save(1, 2, 3, 4)
    assert run.steps() == ["4", "3"]
    assert run.names() == ["step-00000003", "step-00000004"]


def test_training_goes_on_while_a_thread_writes(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write, write = threading.Event(), checkpoint_write.write_tensor_file

    def slow(*arguments: Any) -> Any:
        may_write.wait(20)
        return write(*arguments)

    monkeypatch.setattr(checkpoint_write, "write_tensor_file", slow)
    run.engine.step(1)
    run.checkpoints.save(run.engine, 1, run.model, {"tokens": 10})
    assert run.checkpoints.poll() == []
    assert run.steps() == []
    run.engine.step(2)  # must not reach the checkpoint of step 1
    may_write.set()
    [report] = run.checkpoints.wait()
    assert (report.step, report.error, report.num_bytes > 0) == (1, None, True)
    assert report.stop_seconds > 0
    assert report.write_seconds > 0
    assert run.restore() == 1
    assert run.checkpoints.poll() == []


def test_poll_completes_what_is_written(run: Any) -> None:
    run.engine.step(1)
    run.checkpoints.save(run.engine, 1, run.model, {"tokens": 10})
    assert run.checkpoints._pending is not None
    run.checkpoints._pending.writer._thread.join()
    assert [report.error for report in run.checkpoints.poll()] == [None]
    assert run.steps() == ["1"]


def test_a_closed_run_leaves_its_last_good_one(run: Any, new_run: Callable[..., Any]) -> None:
    run.save(1)
    run.engine.step(2)
    run.checkpoints.save(run.engine, 2, run.model, {})
    run.checkpoints.close()
    assert run.steps() == ["1"]
    again = new_run()
    assert ".unfinished-step-00000002" in again.said[0]
    assert again.restore() == 1
    assert run.names() == ["step-00000001"]


def fail_after(num_bytes: int, error: OSError) -> Callable[..., Any]:
    """Return a writer that fails as a disk does when it is full: in the middle of a file."""

    def write(path: Path, content: memoryview, stop: threading.Event) -> Any:
        path.write_bytes(content[:num_bytes])
        raise error

    return write


def test_a_failed_write_leaves_the_last_good_one(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run.save(1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_write, "write_tensor_file", fail_after(50, OSError(28, "No space left on device")))
        [error] = run.save(2)
    assert error is not None
    assert "rank 0" in error
    assert "No space left on device" in error
    assert "training goes on" in run.said[-1]
    assert run.names() == ["step-00000001"]
    assert run.restore() == 1
    assert run.save(3) == [None]
    assert run.restore() == 3


def test_a_manifest_that_cannot_be_written_leaves_the_last_good_one(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    run.save(1)
    with monkeypatch.context() as patch:
        patch.setattr("raptr_ds.checkpoint.manager.publish", fail)
        [error] = run.save(2)
    assert error is not None
    assert run.names() == ["step-00000001"]
    assert run.restore() == 1


def test_a_file_size_limit_is_a_failed_write(run: Any) -> None:
    run.save(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        [error] = run.save(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error is not None
    assert "File too large" in error
    assert run.names() == ["step-00000001"]


def test_a_defect_of_ours_is_no_warning(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_write, "write_tensor_file", lambda *_: 1 / 0)
    run.engine.step(1)
    run.checkpoints.save(run.engine, 1, run.model, {})
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        run.checkpoints.wait()


def test_a_run_state_that_is_no_json_fails_at_once(run: Any) -> None:
    with pytest.raises(TypeError):
        run.checkpoints.save(run.engine, 1, run.model, {"tokens": object()})


def test_a_folder_that_cannot_be_made_is_the_users_error(tmp_path: Path, groups: ProcessGroups) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PathError, match=r"raptr_ds\.train\.save") as caught:
        check_writable(tmp_path / "file" / "checkpoints", groups)
    assert caught.value.exit_code == Exit.USER_ERROR
    assert str(tmp_path / "file") in str(caught.value)


def test_a_folder_without_permission_is_the_users_error(tmp_path: Path, groups: ProcessGroups) -> None:
    with closed(tmp_path, 0o500), pytest.raises(PathError, match="Permission denied"):
        check_writable(tmp_path / "checkpoints", groups)


def test_a_run_its_checkpoints_or_one_of_them(run: Any, new_run: Callable[..., Any], tmp_path: Path) -> None:
    run.save(1, 2)
    other = new_run(folder=tmp_path / "other" / "checkpoints")
    assert other.restore(str(tmp_path / "run")) == 2
    assert other.restore(str(run.folder)) == 2
    assert other.restore(str(run.folder / "step-00000001")) == 1
    assert run.steps() == ["2", "1"]
    with pytest.raises(CheckpointError, match="no such folder"):
        other.restore(str(tmp_path / "nowhere"))


def test_an_abandoned_branch_of_the_run_does_not_come_back(run: Any) -> None:
    run.save(1, 2, 3)
    assert run.restore(str(run.folder / "step-00000002")) == 2
    assert run.steps() == ["2"]
    assert any("set-aside-1" in line for line in run.said)
    assert run.restore("none") is None
    assert run.steps() == []
    run.save(1)
    assert run.restore() == 1
    assert run.restore(str(run.folder / "set-aside-1")) == 3
    assert run.steps() == []


def test_of_abandoned_branches_the_newest_three_are_kept_and_what_is_loaded(run: Any) -> None:
    for _ in range(4):
        run.save(1)
        assert run.restore("none") is None
    run.checkpoints.wait()
    assert run.names() == ["set-aside-2", "set-aside-3", "set-aside-4"]
    assert any("moved to" in line and "deleted: set-aside-1" in line for line in run.said)
    run.save(1)
    assert run.restore(str(run.folder / "set-aside-2")) == 1
    run.checkpoints.wait()
    assert run.names() == ["set-aside-2", "set-aside-3", "set-aside-4", "set-aside-5"]


def test_a_checkpoint_of_another_model_stops(run: Any, small_model: Callable[..., ModelSection]) -> None:
    run.save(1, 2)
    for where in ("auto", str(run.folder)):
        with pytest.raises(CheckpointError, match="num_layers is 1 there and 3 here"):
            run.checkpoints.restore(run.new_engine(), where, small_model(num_layers=3))
    assert run.steps() == ["2", "1"]


def test_tensors_that_the_checkpoint_lacks_are_named(run: Any) -> None:
    run.save(1)
    more = run.new_engine({**run.engine.shapes, "layers.1.mlp.bias": (6,)})
    with pytest.raises(CheckpointError, match=r"0 of the 6 elements of layers\.1\.mlp\.bias"):
        run.checkpoints.restore(more, "auto", run.model)
    wider = run.new_engine({**run.engine.shapes, "layers.0.mlp.bias": (9,)})
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.bias has shape \[6\]"):
        run.checkpoints.restore(wider, "auto", run.model)


def test_saving_one_step_again_replaces_it(run: Any) -> None:
    run.save(2)
    run.engine.step(1)
    run.checkpoints.save(run.engine, 2, run.model, {"tokens": 0})
    run.checkpoints.wait()
    fresh = run.new_engine()
    restored = run.checkpoints.restore(fresh, "auto", run.model)
    assert restored is not None
    assert restored.run_state == {"tokens": 0}
    assert fresh.values() == run.engine.values()
    assert run.names() == ["step-00000002"]


def test_a_run_can_roll_back_while_it_saves(run: Any) -> None:
    run.save(1)
    run.engine.step(2)
    run.checkpoints.save(run.engine, 2, run.model, {"tokens": 20})
    assert run.restore(str(run.folder / "step-00000001")) == 1
    assert run.steps() == ["1"]
    assert [report.step for report in run.checkpoints.poll()] == [2]


class CrashError(BaseException):
    """The process is gone: nothing catches this, and nothing is done any more."""


FILE_OPERATIONS = [
    (Path, "open"),
    (Path, "mkdir"),
    (Path, "rename"),
    (Path, "replace"),
    (os, "fsync"),
    (shutil, "rmtree"),
]


def crash_from(operation: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the file operation with this number, and all after it, crash; return the list that counts them."""
    done: list[str] = []

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            done.append(name)
            if len(done) > operation:
                raise CrashError(name)
            return original(*arguments, **named)

        return call

    for owner, name in FILE_OPERATIONS:
        monkeypatch.setattr(owner, name, counted(name, getattr(owner, name)))
    return done


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("steps", [(3,), (2,)], ids=["a new step", "a step saved before"])
def test_a_crash_at_any_moment_leaves_a_good_one(
    new_run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: tuple[int, ...]
) -> None:
    restored, operation, has_crashed = set(), 0, True
    while has_crashed:
        folder = tmp_path / f"crash-{operation}"
        run = new_run(keep=1, folder=folder)
        run.save(2)
        with monkeypatch.context() as patch:
            done = crash_from(operation, patch)
            with contextlib.suppress(CrashError, RuntimeError):
                run.save(*steps)
        has_crashed = len(done) > operation
        again = new_run(keep=1, folder=folder)
        restored.add(again.restore())
        assert again.save(4) == [None]
        assert again.names() == ["step-00000004"]
        operation += 1
    assert restored == {2, *steps}
    assert operation > 8


def test_a_held_checkpoint_stays_until_it_is_released(run):
    run.checkpoints.held.add(2)
    run.save(1, 2, 3, 4, 5)
    assert run.steps() == ["5", "4", "2"]
    run.checkpoints.release(2)
    assert run.steps() == ["5", "4"]
    run.checkpoints.release(5)  # one of the newest
    assert run.steps() == ["5", "4"]


def stale(*_: object) -> None:
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def test_old_checkpoints_whose_file_system_is_away_stay_with_a_line(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run.checkpoints.held.add(1)
    run.save(1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", stale)
        assert run.save(3) == [None]
        run.checkpoints.release(1)
    line = f"cannot delete old checkpoints in {run.folder}: {os.strerror(errno.ESTALE)}"
    assert run.said[-2:] == [line, line]
    assert run.steps() == ["3", "2", "1"]
    assert run.save(4) == [None]
    assert run.steps() == ["4", "3"]


def test_abandoned_branches_whose_file_system_is_away_end_the_run_on_every_rank(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.save(1)
    monkeypatch.setattr("raptr_ds.checkpoint.manager.outdated_branches", stale)
    with pytest.raises(StorageError, match="Stale file handle"):
        run.restore("none")
