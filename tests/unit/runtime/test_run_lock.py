"""One run in a folder: a living holder keeps it, a dead one does not, and nobody's clock matters."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from raptr_ds.errors import ConfigError
from raptr_ds.parallel.launch import Launch
from raptr_ds.runtime import run_lock
from raptr_ds.runtime.run_lock import LOCK, Holder, RunLock
from raptr_ds.user_paths import PathError
from tests.unprivileged import closed

LAUNCH = Launch(0, 0, 1, "127.0.0.1", 1, "none")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 0.6)
    monkeypatch.setattr(run_lock, "_LOOK_SECONDS", 0.02)


def lock(folder: Path, launch: Launch = LAUNCH) -> RunLock:
    return RunLock(folder, launch)


def write(folder: Path, holder: Holder, beat: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    (folder / LOCK).write_text(json.dumps({"beat": beat, **asdict(holder)}) + "\n")


def elsewhere(**changes: Any) -> Holder:
    """Return a holder on another machine."""
    return replace(Holder.of(LAUNCH), host="node7", machine="another kernel", **changes)


def test_it_is_held_and_released(tmp_path: Path) -> None:
    held = lock(tmp_path / "new" / "run")
    found = json.loads((tmp_path / "new" / "run" / LOCK).read_text())
    assert (found["process"], found["since"][:2]) == (os.getpid(), "20")
    held.release()
    assert list((tmp_path / "new" / "run").iterdir()) == []
    lock(tmp_path / "new" / "run").release()


def test_a_second_run_is_refused_and_names_the_first(tmp_path: Path) -> None:
    held = lock(tmp_path)
    with pytest.raises(ConfigError, match=rf"another run works in .*process {os.getpid()} on .*since 20.*train\.save"):
        lock(tmp_path)
    held.release()


def test_a_beat_from_another_machine_is_seen(tmp_path: Path) -> None:
    """The holder's process cannot be looked for: its beat shows that it lives."""
    held = lock(tmp_path)
    held._holder = elsewhere(job="77")  # the thread writes this from its next beat on
    write(tmp_path, held._holder)
    time.sleep(0.15)
    with pytest.raises(ConfigError, match="on node7, Slurm job 77"):
        lock(tmp_path)
    held.release()
    assert not (tmp_path / LOCK).exists()


def test_a_lock_without_a_beat_is_taken_over_after_it_was_watched(tmp_path: Path) -> None:
    write(tmp_path, elsewhere())
    begin = time.monotonic()
    held = lock(tmp_path)
    assert time.monotonic() - begin > 0.6
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK]
    held.release()


@pytest.mark.parametrize("content", ["", "half a li", '{"beat": 3}\n', "[]\n", pytest.param("[" * 100_000, id="deep")])
def test_a_damaged_lock_is_taken_over_too(content: str, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(content)
    lock(tmp_path).release()


def test_a_killed_process_of_this_machine_is_known_to_be_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 60.0)
    program = (
        "import sys, time; from pathlib import Path; from raptr_ds.parallel.launch import Launch\n"
        "from raptr_ds.runtime.run_lock import RunLock\n"
        "lock = RunLock(Path(sys.argv[1]), Launch(0, 0, 1, '', 1, 'none'))\n"
        "print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"process {process.pid} "):
        lock(tmp_path)
    process.kill()
    process.wait()
    begin = time.monotonic()
    held = lock(tmp_path)
    assert time.monotonic() - begin < 10
    held.release()


def test_a_requeued_job_does_not_wait_for_its_earlier_self(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 60.0)
    write(tmp_path, elsewhere(job="5", restart=0))
    begin = time.monotonic()
    lock(tmp_path, replace(LAUNCH, slurm_job="5", slurm_restarts=1)).release()
    assert time.monotonic() - begin < 10


def test_a_second_run_of_a_job_is_refused_however_often_each_was_restarted(tmp_path: Path) -> None:
    """Restarts by torchrun or a supervisor within the job say nothing of another run in it; nor here do Slurm's."""
    held = lock(tmp_path, replace(LAUNCH, slurm_job="5"))
    for changes in ({"restart_count": 1}, {"slurm_restarts": 1}):
        with pytest.raises(ConfigError, match="another run works in"):
            lock(tmp_path, replace(LAUNCH, slurm_job="5", **changes))
    held.release()
    held = lock(tmp_path)
    held._holder = elsewhere(job="5")
    write(tmp_path, held._holder)
    with pytest.raises(ConfigError, match="on node7, Slurm job 5"):
        lock(tmp_path, replace(LAUNCH, slurm_job="5", restart_count=1))
    held.release()


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """The exit codes and messages of runs that end themselves."""
    found: list[tuple[int, str]] = []

    def end(code: int, message: str) -> NoReturn:
        found.append((code, message))
        raise OSError  # which the thread takes for a failing disk: it writes nothing, and looks again

    monkeypatch.setattr(run_lock, "exit_now", end)
    return found


def until(holds: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_who_stood_still_ends_when_it_has_lost_the_folder(tmp_path: Path, ended: list[tuple[int, str]]) -> None:
    held = lock(tmp_path)
    write(tmp_path, elsewhere())
    until(lambda: ended)
    code, message = ended[0]
    assert code == 1
    assert "on node7" in message
    assert f"has taken {tmp_path} over while this run stood still: ending at once, without writing" in message
    held.release()
    assert json.loads((tmp_path / LOCK).read_text())["host"] == "node7"  # it is the other's


def test_who_stood_still_ends_when_the_folders_next_run_is_over(
    tmp_path: Path, ended: list[tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, content: str) -> None:
        raise OSError(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(run_lock, "write_atomically", fail)
        held = lock(tmp_path)
        time.sleep(2 * run_lock.STALE_SECONDS)
        (tmp_path / LOCK).unlink()  # as the other run does at its end
    until(lambda: ended)
    assert f"another run has taken {tmp_path} over while this run stood still: ending at once" in ended[0][1]
    assert not (tmp_path / LOCK).exists()
    held.release()


def test_a_lock_that_somebody_deletes_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 45.0)
    held = lock(tmp_path)
    (tmp_path / LOCK).unlink()
    until((tmp_path / LOCK).exists)
    held.release()


def test_two_that_find_a_dead_lock_do_not_both_get_it(tmp_path: Path) -> None:
    """The slower one has decided to remove the dead lock when the faster one holds its own: it puts that back."""
    write(tmp_path, elsewhere())
    slower = lock(tmp_path / "aside")
    dead = run_lock._read(tmp_path / LOCK)
    assert dead is not None
    faster = lock(tmp_path)
    slower._path = tmp_path / LOCK
    slower._remove(dead)
    found = run_lock._read(tmp_path / LOCK)
    assert found is not None
    assert found[0] == faster._holder
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aside", LOCK]
    faster.release()


def test_a_folder_that_may_not_be_written_is_one_message(tmp_path: Path) -> None:
    with closed(tmp_path, 0o500), pytest.raises(PathError, match=r"Permission denied.*raptr_ds\.train\.save"):
        lock(tmp_path / "run")


@pytest.mark.parametrize("mode", [0o500, 0], ids=["read-only", "away"])
def test_a_lock_that_cannot_be_removed_does_not_change_how_the_run_ends(mode: int, tmp_path: Path) -> None:
    held = lock(tmp_path)
    with closed(tmp_path, mode):
        held.release()
    assert (tmp_path / LOCK).exists()
