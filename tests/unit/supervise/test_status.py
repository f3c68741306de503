"""How a run stands, from its folder alone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from raptr_ds.errors import DataError
from raptr_ds.supervise.status import describe, duration, sparkline, status_of

NOW = 1_800_000_000.0
LOCK = {"beat": 3, "key": "k", "host": "node5", "machine": "m", "process": 7, "process_start": "1", "job": "77"}
LOCK |= {"restart": 0, "since": "2027-01-15 08:00:00"}


def training(step: int, **more: Any) -> dict[str, Any]:
    line = {"step": step, "loss": 8.0 - step / 100, "path_length": 3, "phase": 1, "tokens_per_second": 1000.0}
    return line | {"step_seconds": 0.5, "mfu": None, "skipped_steps": 0} | more


def write(folder: Path, lines: list[dict[str, Any]], events: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    config = {"raptr_ds": {"train": {"steps": 400}, "model": {"num_layers": 4}}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    stamped = [{"time": f"2027-01-15T0{number}:00:00+00:00", **event} for number, event in enumerate(events)]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in stamped))
    return folder


def touch(path: Path, content: Any, age: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    os.utime(path, (NOW - age, NOW - age))


@pytest.fixture
def running(tmp_path: Path) -> Path:
    lines = [training(step) for step in range(1, 201)]
    lines[-1] |= {"slowest_rank": 3, "slowest_rank_seconds": 0.4, "median_rank_seconds": 0.2}
    lines += [{"step": 100, "eval_loss": 7.25, "path_length": 4}, {"step": 200, "eval_loss": 9.0, "path_length": 2}]
    boolq = {"shots": 0, "acc": 0.625, "acc_stderr": 0.0123, "bits": 2.0, "bits_stderr": None}
    lines += [{"step": 150, "tasks": {"boolq": boolq}}, {"step": 100, "tasks": {"boolq": {"acc": 0.5}}}]
    events = [
        {"event": "start", "step": 0, "restart_count": 0},
        {"event": "start", "step": 80, "restart_count": 0},
        {"event": "start", "step": 0, "restart_count": 0},  # another run, in the same folder
        {"event": "start", "step": 0, "restart_count": 1},  # which crashed before its first checkpoint
        {"event": "checkpoint_failed", "step": 90, "error": "no room"},
        {"event": "restart", "cause": "fault", "node": "node3", "step": 150},
        {"event": "start", "step": 150, "restart_count": 2},
        {"event": "checkpoint_failed", "step": 190, "error": "no room"},
    ]
    folder = write(tmp_path / "run", lines, events)
    touch(folder / "run.lock", LOCK, age=4)
    touch(folder / "checkpoints" / "step-00000150" / "manifest.json", {"run_state": {"flops": 6, "full_flops": 8}}, 600)
    (folder / "checkpoints" / ".unfinished-step-00000200").mkdir()
    return folder


def test_a_running_run(running: Path) -> None:
    status = status_of(running, NOW)
    assert (status.state, status.holder) == ("running", "process 7 on node5, Slurm job 77, since 2027-01-15 08:00:00")
    assert (status.step, status.num_steps, status.phase, status.starts) == (200, 400, 1, 3)
    assert status.evaluation == (100, 7.25)  # of the full model
    assert (status.step_seconds, status.seconds_left, status.tokens_per_second) == (0.5, 100.0, 1000.0)
    assert (status.flops_saved, status.checkpoint_step, status.checkpoint_age) == (0.25, 150, 600.0)
    assert status.failed_saves == 1
    lengths = [len(describe(status, num_events)) for num_events in (0, 1, 8, 9)]
    assert [length - lengths[0] for length in lengths] == [0, 1, 8, 8]
    text = "\n".join(describe(status))
    for part in (
        "run: running (process 7 on node5",
        "last sign of life 4 s ago",
        "step         200 of 400 (50.0%), phase 1, path 3/4; started 3 times",
        "7.99 to 6.495",
        "held-out     7.2500 after step 100",
        "tasks        boolq acc 0.625 \u00b1 0.012, bits 2 after step 150",
        "speed        1,000 tokens/s, 0.5 s a step",
        "slowest      rank 3: 0.4 s of own work in a step, the median is 0.2 s",
        "saved        25.0%",
        "checkpoint   step 150, 10 min old; 1 could NOT be written",
        "left         100 s",
        "restart: cause fault, node node3, step 150",
    ):
        assert part in text, text


@pytest.mark.parametrize(
    ("events", "lock_age", "steps", "state"),
    [
        ([{"event": "start"}], 4, 10, "running"),
        ([{"event": "start"}], 300, 10, "silent"),
        ([{"event": "start"}, {"event": "end", "exit_code": 0}], None, 400, "finished"),
        ([{"event": "start"}, {"event": "stop"}, {"event": "end", "exit_code": 75}], None, 10, "stopped"),
        ([{"event": "start"}, {"event": "end", "exit_code": 74}], None, 400, "failed"),
        ([{"event": "start"}, {"event": "end", "exit_code": 0}, {"event": "start"}], None, 10, "failed"),
        ([{"event": "start"}, {"event": "restart"}], None, 10, "starting"),
        ([{"event": "start"}, {"event": "restart"}, {"event": "stopped"}], None, 10, "stopped"),
        ([{"event": "start"}, {"event": "restart"}, {"event": "launch"}], None, 10, "starting"),
        ([{"event": "start"}, {"event": "hang"}, {"event": "give_up"}], None, 10, "failed"),
        ([{"event": "end", "exit_code": 0}, {"event": "done"}], None, 400, "finished"),
        ([{"event": "submit"}], None, 0, "queued"),
        ([{"event": "end", "exit_code": 75}, {"event": "submit"}], None, 10, "queued"),
        ([{"event": "submit"}, {"event": "submit"}, {"event": "launch"}], None, 0, "starting"),
        ([], None, 0, "new"),
        ([], None, 400, "finished"),  # of an earlier version, without events
    ],
)
def test_states(events: list[dict[str, Any]], lock_age: float | None, steps: int, state: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "run", [training(step) for step in range(1, steps + 1)], events)
    if lock_age is not None:
        touch(folder / "run.lock", LOCK, lock_age)
    status = status_of(folder, NOW)
    assert status.state == state
    assert describe(status)[0].startswith(f"{folder}: {state}")


@pytest.mark.parametrize("damage", ["no manifest", pytest.param("[" * 100_000, id="deep")])
def test_files_that_are_being_written_or_damaged_do_not_hide_the_rest(damage: str, running: Path) -> None:
    for name in ("metrics.jsonl", "events.jsonl"):
        with (running / name).open("a") as stream:
            stream.write('{"step": 201, "lo')
    touch(running / "checkpoints" / "step-00000180" / "manifest.json", damage, 60)
    (running / "run.lock").write_text('{"beat')
    status = status_of(running, NOW)
    assert (status.step, status.checkpoint_step, status.starts, status.state) == (200, 150, 3, "failed")


def test_failed_saves_are_shown_where_none_has_succeeded(running: Path) -> None:
    shutil.rmtree(running / "checkpoints")
    assert "checkpoint   none; 1 could NOT be written since the last start" in describe(status_of(running, NOW))


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"neither config\.json nor events\.jsonl"):
            status_of(folder)
    (tmp_path / "config.json").write_text('{"raptr')
    with pytest.raises(DataError, match=r"config\.json cannot be read"):
        status_of(tmp_path)


def test_a_submitted_run_waits_in_the_queue(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"time": "2027-01-15T00:00:00+00:00", "event": "submit", "job": "77"}\n')
    status = status_of(tmp_path, NOW)
    assert (status.state, status.step, status.num_steps) == ("queued", 0, None)
    assert describe(status)[:2] == [f"{tmp_path}: queued", "step         0; started 0 times"]
    assert "submit: job 77" in describe(status)[-1]


def test_curves_and_durations() -> None:
    assert sparkline([7.0, 6.0, 5.0, 0.0]) == "█▇▆▁"
    assert sparkline([1.0]) == "▁"
    assert sparkline([float(i) for i in range(800)], columns=8) == "▁▂▃▄▅▆▇█"
    assert [duration(s) for s in (3, 130, 12000, 200000)] == ["3 s", "2 min", "3 h 20 min", "2 d 7 h"]


def test_the_command_line_starts_without_torch(running: Path) -> None:
    os.utime(running / "run.lock", (0, 0))
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['status.py', {str(running)!r}, '--json']\n"
        "sys.path.insert(0, 'tools')\n"
        "try:\n    runpy.run_path('tools/status.py', run_name='__main__')\n"
        "except SystemExit as end:\n    print(end.code)\n"
        "print('torch' in sys.modules)"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    status, code, has_torch = done.stdout.splitlines()
    assert json.loads(status)["state"] == "silent"
    assert (code, has_torch) == ("1", "False")
