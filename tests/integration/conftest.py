"""A tiny corpus, a tiny run, and the command line: as users call it, or in processes that have imported everything."""

import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

from raptr_ds import pretrain
from raptr_ds.parallel.launch import Launch, free_port
from tests.dist.workers import run_distributed

REPOSITORY = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
# Optional keys of a training line: measured anew by each start, of several ranks, or on GPUs.
RANK_KEYS = {"slowest_rank", "slowest_rank_seconds", "median_rank_seconds"}
RANK_KEYS |= {"host_memory_bytes", "host_memory_peak_bytes", "device_memory_peak_bytes"}
PATIENCE = 200.0  # seconds; a start takes 10 where nothing else runs

Command = Callable[..., list[str]]
_DIE_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of made-up words."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghiklmnorstu", k=draw.randint(2, 7))) for _ in range(300)]
    documents = [json.dumps({"text": " ".join(draw.choices(words, k=200))}) for _ in range(60)]
    (folder / "text.jsonl").write_text("\n".join(documents))
    command = [sys.executable, "tools/prepare_data.py", "--input", str(folder / "text.jsonl")]
    command += ["--output", str(folder / "tokens"), "--vocab-size", "600", "--workers", "1"]
    subprocess.run(command, cwd=REPOSITORY, env=ENV, check=True, timeout=PATIENCE, capture_output=True)
    return folder / "tokens"


def tiny_run(data: Path, save: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """Return a run that trains in seconds; `sections` update those of the raptr_ds block."""
    block: dict[str, dict[str, Any]] = {
        "model": {
            "architecture": "bert",
            "num_layers": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "seq_length": 32,
        },
        "path": {"method": "raptr", "schedule": "2-3-4"},
        "data": {"path": str(data)},
        "train": {"steps": 12, "save": str(save)},
        "eval": {"batches": 1},
        "log": {"progress": "plain"},
    }
    for name, values in sections.items():
        block.setdefault(name, {}).update(values)
    return {
        "train_batch_size": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "raptr_ds": block,
    }


@pytest.fixture
def run_file(data_folder: Path, tmp_path: Path) -> Path:
    """The tiny run, saved to `run` beside the file."""
    path = tmp_path / "run.json"
    path.write_text(json.dumps(tiny_run(data_folder, tmp_path / "run")))
    return path


def deepspeed_command(run: Path, *settings: str, processes: int = 2) -> list[str]:
    """Return the documented command, on a free loopback port."""
    command = ["deepspeed", "--num_accelerators", str(processes), "--master_port", str(free_port())]
    command += ["raptr_ds/pretrain.py", "--deepspeed_config", str(run)]
    return command + (["--set", *settings] if settings else [])


def torchrun_command(run: Path, *settings: str) -> list[str]:
    """Return torchrun's command for two processes; it is up sooner than the documented one, by two imports of torch."""
    command = ["torchrun", "--standalone", "--nproc_per_node=2", "raptr_ds/pretrain.py", "--deepspeed_config", str(run)]
    return command + (["--set", *settings] if settings else [])


def plain_command(run: Path, *settings: str) -> list[str]:
    """Return the command of one process without a launcher."""
    command = [sys.executable, "raptr_ds/pretrain.py", "--deepspeed_config", str(run)]
    return command + (["--set", *settings] if settings else [])


def call(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        command, cwd=REPOSITORY, env=ENV, timeout=PATIENCE, capture_output=True, text=True, check=False
    )


def forked(
    run: Path, *settings: str, processes: int = 1, spoil: Callable[[Launch], None] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command line in processes forked from one that has imported everything, and wait for its end.

    An interpreter of its own costs each process 5 s of CPU for its imports: it is for what only a real start shows.
    Nothing ends the other ranks of one that fails alone, as launchers do. Output is that of all ranks, in their order.
    spoil: called in each process before, to make something there go wrong; a function of a module.
    Raises: AssertionError if ranks end with different exit codes.
    """
    ended = forked_ranks(run, *settings, processes=processes, spoil=spoil)
    codes = {rank.returncode for rank in ended}
    assert len(codes) == 1, [(rank.returncode, rank.stderr) for rank in ended]
    stdout, stderr = ("".join(texts) for texts in zip(*((rank.stdout, rank.stderr) for rank in ended), strict=True))
    return subprocess.CompletedProcess(ended[0].args, codes.pop(), stdout, stderr)


def forked_ranks(
    run: Path, *settings: str, processes: int, spoil: Callable[[Launch], None] | None = None
) -> list[subprocess.CompletedProcess[str]]:
    """Do as `forked`, and return how each rank ended: exit codes may differ."""
    words = ["--deepspeed_config", str(run), *(["--set", *settings] if settings else [])]
    ended = run_distributed(_command_line, processes, words, spoil, timeout=PATIENCE)
    return [subprocess.CompletedProcess(words, *rank) for rank in ended]


def _command_line(launch: Launch, words: list[str], spoil: Callable[[Launch], None] | None) -> tuple[int, str, str]:
    """Return the exit code, standard output and standard error of `pretrain.main` in a fork of this worker."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        child = os.fork()
        if child == 0:
            os.chdir(REPOSITORY)
            if launch.world_size == 1:  # as without a launcher
                for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
                    del os.environ[name]
            for stream, file in ((sys.stdout, stdout), (sys.stderr, stderr)):
                stream.flush()
                os.dup2(file.fileno(), stream.fileno())
            _end_with(words, launch, spoil)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = []
        for file in (stdout, stderr):
            file.seek(0)
            texts.append(file.read())
    return code, *texts


def _end_with(words: list[str], launch: Launch, spoil: Callable[[Launch], None] | None) -> NoReturn:
    """Run `pretrain.main` in this process and end it as pretrain.py does."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    code = 1
    try:
        if spoil is not None:
            spoil(launch)
        code = int(pretrain.main(words))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def lines_of(save: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl, or of another file of such lines."""
    path = save / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def training_lines(save: Path) -> list[dict[str, Any]]:
    """Return the training lines of a run's metrics.jsonl."""
    return [line for line in lines_of(save) if "loss" in line]
