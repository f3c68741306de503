"""Stops: a signal, a lost launcher or a lost rank ends the run within seconds, with a checkpoint where possible."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from raptr_ds.data.loader import Loader
from raptr_ds.engine.zero import ZeroEngine
from raptr_ds.errors import Exit
from raptr_ds.parallel.launch import Launch
from raptr_ds.paths.growth import Growth
from tests.integration.conftest import (
    ENV,
    PATIENCE,
    REPOSITORY,
    deepspeed_command,
    forked,
    forked_ranks,
    tiny_run,
    training_lines,
)

MANY = ["raptr_ds.train.steps=100000", "raptr_ds.eval.batches=0", "raptr_ds.path.schedule=2-4"]


def _start(run_file: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        deepspeed_command(run_file, *MANY),
        cwd=REPOSITORY,
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _wait_until_training(save: Path, process: subprocess.Popen[str], steps: int = 3) -> None:
    deadline = time.monotonic() + PATIENCE
    while len(_lines_so_far(save)) < steps:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run did not start to train"
        time.sleep(0.1)


def _lines_so_far(save: Path) -> list[dict[str, Any]]:
    try:
        return training_lines(save)
    except ValueError:  # a line is being written
        return []


def _workers(run_file: Path) -> list[int]:
    """Return this run's training processes: the launcher gives them its run file and a local rank."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_text(errors="replace").split("\0")
        except OSError:  # gone meanwhile
            continue
        if str(run_file) in words and any(word.startswith("--local_rank=") for word in words):
            found.append(int(entry.name))
    return found


def _end(process: subprocess.Popen[str], run_file: Path) -> None:
    for pid in [process.pid, *_workers(run_file)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _wait_for_none(run_file: Path, seconds: float) -> float:
    started = time.monotonic()
    while _workers(run_file):
        assert time.monotonic() - started < seconds, "training processes live on"
        time.sleep(0.1)
    return time.monotonic() - started


@pytest.mark.parametrize("how", ["TERM to a worker", "TERM to the launcher", "KILL to the launcher"])
def test_a_stop_leaves_a_checkpoint_and_no_process(how: str, run_file: Path, tmp_path: Path) -> None:
    save = tmp_path / "run"
    process = _start(run_file)
    try:
        _wait_until_training(save, process)
        workers = _workers(run_file)
        assert len(workers) == 2
        number = signal.SIGKILL if how.startswith("KILL") else signal.SIGTERM
        os.kill(workers[1] if "worker" in how else process.pid, number)
        _wait_for_none(run_file, 30)
        if "worker" in how:
            assert process.wait(30) == 75
    finally:
        _end(process, run_file)
    steps = [line["step"] for line in training_lines(save)]
    assert steps == list(range(1, steps[-1] + 1))
    checkpoints = sorted(path.name for path in (save / "checkpoints").iterdir())
    assert checkpoints == [f"step-{steps[-1]:08}"]
    more = forked(run_file, *MANY[1:], f"raptr_ds.train.steps={steps[-1] + 3}", processes=2)
    assert more.returncode == 0, more.stdout + more.stderr
    assert [line["step"] for line in training_lines(save)] == list(range(1, steps[-1] + 4))


def _die_at_step_4(launch: Launch, rank: int) -> None:
    at = Loader.at

    def dying(loader: Loader, step: int, first_sample: int | None = None) -> Any:
        if step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return at(loader, step, first_sample)

    if launch.rank == rank:
        Loader.at = dying  # type: ignore[method-assign]


@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("layout", ["data", "pipeline", "tensor"])
def test_who_loses_a_rank_says_so_by_its_exit_code(layout: str, killed: int, run_file: Path) -> None:
    """Launchers report ranks in any order: none may take the one that lost another for the one that failed."""
    settings = [] if layout == "data" else [f"raptr_ds.parallel.{layout}_model_parallel_size=2"]
    ended = forked_ranks(run_file, *settings, processes=2, spoil=partial(_die_at_step_4, rank=killed))
    assert ended[killed].returncode == -signal.SIGKILL
    survivor = ended[1 - killed]
    assert survivor.returncode == Exit.LOST_RANK, survivor.stderr
    assert "LostRankError: a connection to another rank broke" in survivor.stderr
    assert "Traceback" not in survivor.stderr


def _stop_while_growing(launch: Launch) -> None:
    grow = ZeroEngine.grow

    def stopping(engine: ZeroEngine, growth: Growth) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        grow(engine, growth)

    if launch.rank == 1:
        ZeroEngine.grow = stopping  # type: ignore[method-assign]


def test_a_stop_while_stacking_grows_is_made_at_most_a_step_later(data_folder: Path, tmp_path: Path) -> None:
    run, path = tmp_path / "run.json", {"method": "stacking", "schedule": "2-4", "growth_warmup_steps": 2}

    def train(name: str, spoil: Callable[[Launch], None] | None = None) -> tuple[int, list[dict[str, Any]]]:
        run.write_text(json.dumps(tiny_run(data_folder, tmp_path / name, path=path)))
        return forked(run, processes=2, spoil=spoil).returncode, training_lines(tmp_path / name)

    code, whole = train("whole")
    assert code == Exit.DONE
    grown = next(line["step"] for line in whole if line["path_length"] == 4)
    code, stopped = train("run", _stop_while_growing)
    assert code == Exit.CONTINUE_LATER
    assert len(stopped) in (grown, grown + 1)
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{len(stopped):08}"]
    code, continued = train("run")
    assert code == Exit.DONE
    for key in ("step", "path", "loss", "grad_norm", "lr"):
        assert [line[key] for line in continued] == [line[key] for line in whole]


def test_a_killed_rank_ends_the_run(run_file: Path, tmp_path: Path) -> None:
    """kill -9 of one rank: the others do not wait for it for ever."""
    process = _start(run_file)
    try:
        _wait_until_training(tmp_path / "run", process)
        workers = _workers(run_file)
        os.kill(workers[0], signal.SIGKILL)
        assert process.wait(60) not in (0, 2, 75)
        _wait_for_none(run_file, 30)
    finally:
        _end(process, run_file)
