"""bert_raptr.sbatch trains a tiny BERT on two logical nodes: the real pretrain.py, a stop, and its continuation."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import forked, lines_of
from tests.integration.test_kills import TIMES
from tests.slurm.lab import SlurmLab, why_unavailable

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "slurm" / "bert_raptr.sbatch"
NUM_STEPS = 60
# Two losses of the same step in different layouts: fp32, summed in another order, over at most 60 steps.
RELATIVE_TOLERANCE = 1e-4
# Seconds; a start takes 10 where nothing else runs. Longer only because other work may hold the cores.
PATIENCE = 150.0

ENV = {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "RAPTR_VENV": sys.prefix if (Path(sys.prefix) / "bin" / "activate").exists() else "",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of made-up words."""
    reason = why_unavailable()
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("data")
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghiklmnorstu", k=draw.randint(2, 7))) for _ in range(300)]
    documents = [json.dumps({"text": " ".join(draw.choices(words, k=200))}) for _ in range(60)]
    (folder / "text.jsonl").write_text("\n".join(documents))
    prepare = [sys.executable, "tools/prepare_data.py", "--input", str(folder / "text.jsonl")]
    prepare += ["--output", str(folder / "tokens"), "--vocab-size", "600", "--workers", "1"]
    subprocess.run(prepare, cwd=REPOSITORY, env=os.environ | ENV, check=True, timeout=PATIENCE, capture_output=True)
    return folder / "tokens"


@pytest.fixture
def run_file(data_folder: Path, tmp_path: Path) -> Path:
    """A run file whose run goes to `run` beside it."""
    run = {
        "train_batch_size": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "raptr_ds": {
            "model": {
                "architecture": "bert",
                "num_layers": 4,
                "hidden_size": 32,
                "num_attention_heads": 2,
                "seq_length": 32,
            },
            "path": {"method": "raptr", "schedule": "2-3-4"},
            "data": {"path": str(data_folder)},
            "train": {"steps": NUM_STEPS, "save": str(tmp_path / "run")},
            "eval": {"interval": 0, "batches": 1},
            "log": {"tensorboard": False, "progress": "plain"},
        },
    }
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run))
    return path


def _metrics(run_file: Path) -> list[dict[str, Any]]:
    path = run_file.parent / "run" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _training(run_file: Path) -> list[dict[str, Any]]:
    return [line for line in _metrics(run_file) if "loss" in line]


def _wait_for_steps(run_file: Path, count: int, lab: SlurmLab, job: int) -> None:
    deadline = time.monotonic() + PATIENCE
    path = run_file.parent / "run" / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline, lab.output(job)
        time.sleep(0.05)


def _uninterrupted(run_file: Path, save: Path) -> list[dict[str, Any]]:
    """Train the same run in one process, without Slurm, and return its training lines."""
    command = [sys.executable, "raptr_ds/pretrain.py", "--deepspeed_config", str(run_file)]
    command += ["--set", f"raptr_ds.train.save={save}/run", "raptr_ds.eval.batches=0"]
    subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | ENV, check=True, timeout=PATIENCE, stdout=subprocess.DEVNULL
    )
    return _training(save / "run.json")


def test_stopped_and_requeued_it_continues_as_if_never_stopped(lab: SlurmLab, run_file: Path, tmp_path: Path) -> None:
    job = lab.submit(str(SCRIPT), env=ENV | {"RAPTR_CONFIG": str(run_file)})
    _wait_for_steps(run_file, 5, lab, job)
    lab.command("scancel", "--signal=USR1", "--batch", str(job))
    ended = lab.wait_for(job, seconds=PATIENCE)
    output = lab.output(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), output
    assert "stopped with a checkpoint: back to the queue" in output
    assert "continuing after step" in output

    lines = _training(run_file)
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1)), output
    assert [line["step"] for line in _metrics(run_file) if "eval_loss" in line] == [NUM_STEPS]
    alone = _uninterrupted(run_file, tmp_path / "alone")
    assert [line["path"] for line in lines] == [line["path"] for line in alone]
    losses = [line["loss"] for line in lines]
    assert losses == pytest.approx([line["loss"] for line in alone], rel=RELATIVE_TOLERANCE)


def _process_of(job: int, rank: int) -> int:
    """Return the process of a rank of a job, as seen from outside of the cluster's namespaces."""
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
    for folder in Path("/proc").iterdir():
        try:
            is_rank = b"raptr_ds/pretrain.py" in (folder / "cmdline").read_bytes().split(b"\0")
            if is_rank and wanted <= set((folder / "environ").read_bytes().split(b"\0")):
                return int(folder.name)
        except OSError:  # no process, or gone meanwhile
            continue
    raise AssertionError(f"job {job} has no rank {rank}")


def test_a_rank_killed_by_9_costs_a_restart_and_no_bit(lab: SlurmLab, run_file: Path, tmp_path: Path) -> None:
    env = ENV | {"RAPTR_CONFIG": str(run_file), "RAPTR_MAX_RETRIES": "0", "SLURM_WAIT": "2"}
    job = lab.submit(str(SCRIPT), "--set", "raptr_ds.checkpoint.interval=3", env=env)
    _wait_for_steps(run_file, 8, lab, job)
    os.kill(_process_of(job, 1), signal.SIGKILL)
    ended = lab.wait_for(job, seconds=PATIENCE)
    output = lab.output(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), output
    events = [json.loads(line) for line in (run_file.parent / "run" / "events.jsonl").read_text().splitlines()]
    (restart,) = [event for event in events if event["event"] == "restart"]
    assert (restart["cause"], restart["node"]) == ("fault", "node2"), output
    assert restart["step"] >= 3

    alone = tmp_path / "alone" / "run"
    done = forked(run_file, f"raptr_ds.train.save={alone}", "raptr_ds.checkpoint.interval=3", processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    # Floats are written with all their digits.
    expected, found = ([_without_times(line) for line in lines_of(save)] for save in (alone, run_file.parent / "run"))
    assert [line["step"] for line in found if "loss" in line] == list(range(1, NUM_STEPS + 1))
    assert found == expected


def _without_times(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in TIMES}


def test_two_nodes_of_two_tasks_tensor_by_data_parallel(lab: SlurmLab, run_file: Path) -> None:
    overrides = "raptr_ds.parallel.tensor_model_parallel_size=2 raptr_ds.train.steps=6"
    job = lab.submit(
        "--ntasks-per-node=2", str(SCRIPT), "--set", *overrides.split(), env=ENV | {"RAPTR_CONFIG": str(run_file)}
    )
    ended = lab.wait_for(job, seconds=PATIENCE)
    assert ended["JobState"] == "COMPLETED", lab.output(job)
    assert [line["step"] for line in _training(run_file)] == list(range(1, 7))
    assert [line["path_length"] for line in _training(run_file)] == [2, 2, 3, 3, 4, 4]
    config = json.loads((run_file.parent / "run" / "config.json").read_text())
    assert config["raptr_ds"]["parallel"]["tensor_model_parallel_size"] == 2


def test_a_wrong_run_file_fails_the_job_with_2(lab: SlurmLab, run_file: Path) -> None:
    job = lab.submit(str(SCRIPT), "--set", "raptr_ds.model.num_layer=4", env=ENV | {"RAPTR_CONFIG": str(run_file)})
    ended = lab.wait_for(job, seconds=PATIENCE)
    output = lab.output(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0"), output
    assert output.count("num_layers") >= 1
    assert output.count("ConfigError") == 1, "one message, from one rank"


def test_a_batch_script_that_forgets_srun_fails_with_2(lab: SlurmLab, run_file: Path, tmp_path: Path) -> None:
    script = tmp_path / "forgotten.sbatch"
    command = f"python {REPOSITORY}/raptr_ds/pretrain.py --deepspeed_config {run_file}"
    script.write_text(f"#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=1\n{command}\n")
    job = lab.submit(str(script), env=ENV)
    ended = lab.wait_for(job, seconds=PATIENCE)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0"), lab.output(job)
    assert "the Slurm job has 2 tasks, and this process is none of them" in lab.output(job)
    assert not (run_file.parent / "run").exists()
