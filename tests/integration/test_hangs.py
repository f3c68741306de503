"""A rank that does not move: found by the others, named with its place, and all leave within a bounded time."""

import json
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from raptr_ds.data.loader import Loader
from raptr_ds.parallel.launch import Launch
from raptr_ds.runtime.watchdog import describe
from tests.integration.conftest import ENV, PATIENCE, REPOSITORY, forked, torchrun_command, training_lines

QUICK = "raptr_ds.train.watchdog_seconds=3"


def _hang_rank_1_in_its_data(launch: Launch) -> None:
    at = Loader.at

    def stuck(loader: Loader, step: int, first_sample: int | None = None) -> Any:
        if launch.rank == 1 and step == 4:
            threading.Event().wait()
        return at(loader, step, first_sample)

    Loader.at = stuck  # type: ignore[method-assign]


def test_the_rank_that_hangs_is_named_with_its_place(run_file: Path, tmp_path: Path) -> None:
    done = forked(run_file, QUICK, processes=2, spoil=_hang_rank_1_in_its_data)
    assert done.returncode == 76, done.stdout + done.stderr
    report = done.stderr
    assert report.count("raptr_ds: hung: nothing has moved for") == 1
    assert re.search(r"rank 1 \(\S+\), after step 4: in wait .*called from", report), report
    assert re.search(r"rank 0 \(\S+\), after step 4: in \S+ \(torch/distributed/", report), report
    (folder,) = (tmp_path / "run").glob("hang-*")
    assert str(folder) in report
    stacks = (folder / "rank-00001.txt").read_text()
    assert "stuck" in stacks
    assert (folder / "rank-00000.txt").stat().st_size
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "hang"
    assert events[-1]["ranks"]["1"]["place"] == "after step 4"
    assert [line["step"] for line in training_lines(tmp_path / "run")] == [1, 2, 3, 4]
    assert forked(run_file, QUICK, processes=2).returncode == 0  # started again, it trains to the end
    assert not list((tmp_path / "run").glob("run.lock"))


def _compute_for_6_seconds(launch: Launch) -> None:
    """Evaluate slowly, but never stand still."""
    validation = Loader.validation

    def slow(loader: Loader, index: int) -> Any:
        time.sleep(2)
        return validation(loader, index)

    Loader.validation = slow  # type: ignore[method-assign]


def test_slow_work_is_no_hang(run_file: Path) -> None:
    done = forked(run_file, QUICK, "raptr_ds.eval.batches=3", spoil=_compute_for_6_seconds)
    assert done.returncode == 0, done.stderr


def _suspend_for_7_seconds(launch: Launch) -> None:
    at, process = Loader.at, os.getpid()

    def suspended(loader: Loader, step: int, first_sample: int | None = None) -> Any:
        if step == 4:
            subprocess.Popen(["sh", "-c", f"kill -STOP {process}; sleep 7; kill -CONT {process}"])
            time.sleep(0.5)
        return at(loader, step, first_sample)

    Loader.at = suspended  # type: ignore[method-assign]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_suspended_as_a_whole_is_no_hang(processes: int, run_file: Path, tmp_path: Path) -> None:
    done = forked(run_file, QUICK, processes=processes, spoil=_suspend_for_7_seconds)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line)["event"] for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert "hang" not in events


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_is_named(stopped: int, run_file: Path, tmp_path: Path) -> None:
    """With rank 0 stopped too: under torchrun the store is the launcher's."""
    command = torchrun_command(run_file, QUICK, "raptr_ds.train.steps=100000", "raptr_ds.path.schedule=4")
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(command, cwd=REPOSITORY, env=ENV, stdout=log, stderr=log)
    workers: list[int] = []
    try:
        deadline = time.monotonic() + PATIENCE
        while len(_lines(tmp_path / "run")) < 3:
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.1)
        workers = _ranks_of(run_file)
        os.kill(workers[stopped], signal.SIGSTOP)
        while "raptr_ds: hung" not in (tmp_path / "log").read_text():
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.1)
    finally:
        for process in [launcher.pid, *workers]:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        launcher.wait()
    text = (tmp_path / "log").read_text()
    assert f"rank {stopped} did not answer: stopped, or the machine is gone" in text
    assert re.search(rf"rank {1 - stopped} \(\S+\), after step \d+: in", text)


def _lines(save: Path) -> list[dict[str, Any]]:
    try:
        return training_lines(save)
    except ValueError:  # a line is being written
        return []


def _ranks_of(run_file: Path) -> list[int]:
    """Return the processes of a run by rank."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            environment = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        rank = next((value[5:] for value in environment if value.startswith("RANK=")), None)
        if str(run_file) in words and rank is not None:
            found[int(rank)] = int(entry.name)
    return [found[rank] for rank in sorted(found)]


def test_places_are_listed_with_the_fewest_ranks_first() -> None:
    answers = {
        rank: {"host": f"node{rank // 4}", "place": "after step 7", "where": "read" if rank == 5 else "all_reduce"}
        for rank in range(8)
        if rank != 2
    }
    assert describe(answers, 8) == [
        "rank 2 did not answer: stopped, or the machine is gone",
        "rank 5 (node1), after step 7: in read",
        "ranks 0, 1, 3, 4, 6, 7 (node0, node1), after step 7: in all_reduce",
    ]
