"""kill -9 of a whole run at random moments: started again until it is done, it is the run that nobody killed."""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.conftest import (
    ENV,
    PATIENCE,
    RANK_KEYS,
    REPOSITORY,
    forked,
    lines_of,
    tiny_run,
    torchrun_command,
)

STEPS = 60
TIMES = {"step_seconds", "tokens_per_second", "mfu", *RANK_KEYS}  # what two runs of the same steps need not share


def _children_of() -> dict[int, list[int]]:
    """Return the children of every process."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
            except OSError:  # gone meanwhile
                continue
            children.setdefault(parent, []).append(int(entry.name))
    return children


def _tree(root: int) -> Iterator[int]:
    children, waiting = _children_of(), [root]
    while waiting:
        process = waiting.pop()
        yield process
        waiting += children.get(process, [])


def _kill(process: subprocess.Popen[bytes]) -> None:
    for pid in list(_tree(process.pid)):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def _num_lines(save: Path) -> int:
    path = save / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _start_and_kill(run: Path, save: Path, after_lines: int, after_seconds: float) -> None:
    """Start the run and kill all its processes once it has written so many lines and that time has passed.

    On a fast machine before that time: while there are steps left.
    """
    with (run.parent / "killed.log").open("ab") as log:
        process = subprocess.Popen(
            torchrun_command(run), cwd=REPOSITORY, env=ENV, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + PATIENCE
        while _num_lines(save) < after_lines:
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline, "the run did not get that far"
            time.sleep(0.005)
        until = time.monotonic() + after_seconds
        while time.monotonic() < until and _num_lines(save) < STEPS - 8:
            time.sleep(0.005)
        assert process.poll() is None, "the run ended before it could be killed"
    finally:
        _kill(process)


def _write(run: Path, data: Path, save: Path) -> Path:
    sections: dict[str, dict[str, Any]] = {
        "train": {"steps": STEPS},
        "checkpoint": {"interval": 3},
        "eval": {"interval": 7},
        "path": {"skipped_update": "zero_grad"},
    }
    tree = tiny_run(data, save, **sections)
    tree.update(zero_optimization={"stage": 2}, bf16={"enabled": True})
    run.write_text(json.dumps(tree))
    return run


def _final_state(save: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the last checkpoint's tensors, by file and key, and what its manifest says beside checksums."""
    folder = save / "checkpoints" / f"step-{STEPS:08}"
    tensors = {
        f"{path.name} {key}": tensor
        for path in sorted(folder.glob("*.safetensors"))
        for key, tensor in load_file(path).items()
    }
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["run_state"]["identity"]["config"]["raptr_ds"]["train"]["save"]
    return tensors, {key: manifest[key] for key in ("step", "run_state", "loss_scaler", "step_counts", "entries")}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_killed_at_random_moments_is_the_run_that_nobody_killed(data_folder: Path, tmp_path: Path) -> None:
    moments = random.Random(20)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = forked(_write(tmp_path / "whole.json", data_folder, whole), processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    run = _write(tmp_path / "killed.json", data_folder, killed)
    _start_and_kill(run, killed, moments.randint(5, 20), moments.uniform(0, 0.2))  # steps, savings and evaluations
    _start_and_kill(run, killed, 0, moments.uniform(2, 10))  # imports, the checkpoint's reading, first steps
    _start_and_kill(run, killed, moments.randint(35, 50), moments.uniform(0, 0.2))
    done = forked(run, processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "continuing after step" in done.stdout

    expected, found = lines_of(whole), lines_of(killed)
    assert [line["step"] for line in found if "loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in found if "eval_loss" in line] == [*range(7, STEPS, 7), STEPS]
    for one, other in zip(expected, found, strict=True):  # floats are written with all their digits
        assert {k: v for k, v in one.items() if k not in TIMES} == {k: v for k, v in other.items() if k not in TIMES}
    (tensors, manifest), (other_tensors, other_manifest) = _final_state(whole), _final_state(killed)
    assert manifest == other_manifest
    assert tensors.keys() == other_tensors.keys()
    assert len(tensors) > 10
    assert [key for key in tensors if not torch.equal(tensors[key], other_tensors[key])] == []
    # Nothing of the killed writers is left.
    assert sorted(path.name for path in (killed / "checkpoints").iterdir()) == [
        f"step-{STEPS - 3:08}",
        f"step-{STEPS:08}",
    ]
