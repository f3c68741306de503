"""The guard of a job, its supervisor and Slurm's commands being stand-ins: who puts the job back, and when."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from raptr_ds.runtime.events import read_events
from raptr_ds.supervise.policy import Ending, Limits
from raptr_ds.supervise.supervisor import Supervised

REPOSITORY = Path(__file__).resolve().parents[3]
PATIENCE = 60.0
SCONTROL = """#!/bin/sh
echo "$@" >>asked
case "$1 $2" in
"show job") echo "JobId=7 JobState=RUNNING Reason=TimeLimit Restarts=${RESTARTS:-0}" ;;
"show config") echo "KillWait                = ${KILL_WAIT:-30} sec" ;;
esac
"""


@pytest.fixture
def supervisor() -> Iterator[subprocess.Popen[bytes]]:
    """A process that lives until it is killed."""
    with subprocess.Popen(["sleep", "300"]) as process:
        yield process
        process.kill()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Returns a guard that watches a process."""
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "node1"}
    env = {**os.environ, **job, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    started = []

    def start(watched: int, kill_wait: int = 30, restarts: int = 0) -> subprocess.Popen[bytes]:
        words = [sys.executable, str(REPOSITORY / "tools" / "supervise.py")]
        words += ["--guard", str(watched), "--folder", str(tmp_path), "--", "-"]
        started.append(
            subprocess.Popen(words, cwd=tmp_path, env={**env, "KILL_WAIT": str(kill_wait), "RESTARTS": str(restarts)})
        )
        wait_for(lambda: "show config" in asked(tmp_path))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def asked(folder: Path) -> list[str]:
    """Return what Slurm was asked."""
    return (folder / "asked").read_text().splitlines() if (folder / "asked").exists() else []


def names(folder: Path) -> list[str]:
    return [event["event"] for event in read_events(folder)]


def test_a_supervisor_that_lives_is_left_to_judge(
    tmp_path: Path, supervisor: subprocess.Popen[bytes], start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    run = Supervised(tmp_path, "7", Limits())
    run.begin(0)
    guard = start(supervisor.pid)
    guard.send_signal(signal.SIGTERM)
    time.sleep(2)
    assert (guard.poll(), names(tmp_path)) == (None, ["launch"])
    run.judge(0, Ending(0))
    assert guard.wait(PATIENCE) == 0
    assert (names(tmp_path), "requeue 7" in asked(tmp_path)) == (["launch", "done"], False)


def test_a_job_that_its_supervisor_has_put_back_is_left_alone(
    tmp_path: Path, supervisor: subprocess.Popen[bytes], start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    Supervised(tmp_path, "7", Limits()).begin(0)
    guard = start(supervisor.pid, kill_wait=2, restarts=1)  # at the time limit, and the tasks still save
    guard.send_signal(signal.SIGTERM)
    assert guard.wait(PATIENCE) == 0
    assert (names(tmp_path), asked(tmp_path)[-1]) == (["launch"], "show job -o 7")


@pytest.mark.parametrize("is_judged", [False, True])
def test_a_job_whose_supervisor_was_killed_is_put_back(
    tmp_path: Path,
    supervisor: subprocess.Popen[bytes],
    start: Callable[..., subprocess.Popen[bytes]],
    is_judged: bool,
) -> None:
    run = Supervised(tmp_path, "7", Limits())
    run.begin(0)
    guard = start(supervisor.pid)
    if is_judged:  # and then it was killed, before it came to the requeue
        run.judge(0, Ending(137))
    supervisor.kill()  # nobody has noticed: it is a zombie
    guard.send_signal(signal.SIGTERM)
    assert guard.wait(15) == 0  # with a supervisor that lives it would wait for 25 s
    assert (names(tmp_path), asked(tmp_path)[-1]) == (["launch", "restart"], "requeue 7")


@pytest.mark.parametrize("is_visible", [True, False])
def test_it_acts_before_it_is_killed_itself(
    tmp_path: Path,
    supervisor: subprocess.Popen[bytes],
    start: Callable[..., subprocess.Popen[bytes]],
    is_visible: bool,
) -> None:
    Supervised(tmp_path, "7", Limits()).begin(0)
    guard = start(supervisor.pid if is_visible else 2**22 + 1, kill_wait=4)  # no process has such a number
    begun = time.monotonic()
    guard.send_signal(signal.SIGTERM)
    assert guard.wait(PATIENCE) == 0
    assert time.monotonic() - begun > 1.9
    assert (names(tmp_path), asked(tmp_path)[-1]) == (["launch", "restart"], "requeue 7")
