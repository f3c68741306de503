"""Mistakes in run files and data: exit code 2, one message with what is wrong and how to fix it, nothing trained."""

import json
import os
import shutil
import socket
import subprocess
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from raptr_ds import pretrain
from raptr_ds.data.loader import Loader
from raptr_ds.parallel.launch import Launch
from tests.integration.conftest import (
    ENV,
    PATIENCE,
    REPOSITORY,
    call,
    deepspeed_command,
    forked,
    forked_ranks,
    plain_command,
    tiny_run,
)


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[last] = value


CONFIG_MISTAKES = {
    "unknown key": ("raptr_ds.train.step", 3, ["raptr_ds.train.step", "'steps'"]),
    "unknown DeepSpeed key": ("zero_optimisation", {"stage": 1}, ["zero_optimisation", "zero_optimization"]),
    "heads": ("raptr_ds.model.num_attention_heads", 5, ["num_attention_heads", "32", "5"]),
    "schedule too long": ("raptr_ds.path.schedule", "2-5", ["schedule", "5", "4"]),
    "schedule not full": ("raptr_ds.path.schedule", "2-3", ["schedule", "3", "4"]),
    "schedule below fixed": ("raptr_ds.path.schedule", "1-4", ["schedule", "fixed"]),
    "tensor size": ("raptr_ds.parallel.tensor_model_parallel_size", 3, ["tensor_model_parallel_size", "3"]),
    "vocabulary": ("raptr_ds.model.vocab_size", 599, ["vocab_size", "599", "600"]),
    "no data": ("raptr_ds.data.path", "/nowhere/at/all", ["/nowhere/at/all"]),
    "not writable": ("raptr_ds.train.save", "/proc/run", ["/proc/run", "written"]),
}


@pytest.mark.parametrize("mistake", CONFIG_MISTAKES)
def test_a_mistake_in_the_run_file(mistake: str, data_folder: Path, tmp_path: Path) -> None:
    key, value, said = CONFIG_MISTAKES[mistake]
    tree = tiny_run(data_folder, tmp_path / "run")
    _set(tree, key, value)
    run = tmp_path / "run.json"
    run.write_text(json.dumps(tree))
    done = call(plain_command(run))
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("raptr_ds: ") == 1
    assert "Traceback" not in done.stderr
    for part in said:
        assert part in done.stderr, done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def _truncate(folder: Path) -> None:
    path = folder / "train.bin"
    path.write_bytes(path.read_bytes()[:1000])


def _empty(folder: Path) -> None:
    (folder / "train.idx").write_bytes(b"")


def _not_an_index(folder: Path) -> None:
    (folder / "train.idx").write_bytes(b"something else entirely" * 10)


def _missing(folder: Path) -> None:
    (folder / "validation.bin").unlink()


DATA_MISTAKES = {"truncated .bin": _truncate, "empty .idx": _empty, "foreign .idx": _not_an_index, "missing": _missing}


@pytest.mark.parametrize("mistake", DATA_MISTAKES)
def test_a_damaged_data_folder(mistake: str, data_folder: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "tokens"
    shutil.copytree(data_folder, damaged)
    DATA_MISTAKES[mistake](damaged)
    run = tmp_path / "run.json"
    run.write_text(json.dumps(tiny_run(damaged, tmp_path / "run")))
    done = forked(run)
    assert done.returncode == 2, done.stdout + done.stderr
    assert str(damaged) in done.stderr
    assert "Traceback" not in done.stderr


def test_too_few_sentinels(data_folder: Path, tmp_path: Path) -> None:
    changes = {"model": {"architecture": "ul2", "seq_length": 4096}}
    run = tmp_path / "run.json"
    run.write_text(json.dumps(tiny_run(data_folder, tmp_path / "run", **changes)))
    done = forked(run)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "sentinels" in done.stderr


def _wait_less_for_rank_0(launch: Launch) -> None:
    pretrain._FIRST_RANK_SECONDS = 1.0  # launchers end the other ranks at once; here nothing does


def test_one_rank_speaks_and_none_hangs(run_file: Path) -> None:
    """Both kinds of mistake: before the processes meet, and, through the launcher, after."""
    settings = "raptr_ds.parallel.tensor_model_parallel_size=4"
    world = forked(run_file, settings, processes=2, spoil=_wait_less_for_rank_0)
    assert world.returncode == 2, world.stderr
    assert (world.stdout + world.stderr).count("raptr_ds: ConfigError") == 1
    data = call(deepspeed_command(run_file, "raptr_ds.data.path=/nowhere"))
    assert data.returncode == 2, data.stderr
    assert (data.stdout + data.stderr).count("raptr_ds: DataError") == 1


def _miss_the_run_file(launch: Launch, ranks: tuple[int, ...]) -> None:
    """Let the run file be away where these ranks are."""
    load = pretrain.load_run_config
    if launch.rank in ranks:
        pretrain.load_run_config = lambda file, *others, **keys: load(Path("/nowhere", file.name), *others, **keys)


@pytest.mark.parametrize(("ranks", "named"), [((1,), "ranks 1 of 2"), ((2, 3), "ranks 2, 3 of 4")])
def test_a_run_file_that_some_nodes_lack_is_named_by_the_first_rank(
    ranks: tuple[int, ...], named: str, run_file: Path
) -> None:
    processes = int(named[-1])
    ended = forked_ranks(run_file, processes=processes, spoil=partial(_miss_the_run_file, ranks=ranks))
    assert [rank.returncode for rank in ended] == [2] * processes
    assert [rank.stderr.count("raptr_ds: ") for rank in ended] == [1] + [0] * (processes - 1)
    assert (
        f"{named} cannot train; on {socket.gethostname()}: run file /nowhere/run.json does not exist" in ended[0].stderr
    )


def _lose_tokens(launch: Launch, ranks: tuple[int, ...], split: str) -> None:
    """Let a split's file end at its beginning for some ranks, once they train."""
    at = Loader.at

    def losing(loader: Loader, step: int, first_sample: int | None = None) -> Any:
        if step == 4:
            samples = loader.training_samples if split == "train" else loader.validation_samples
            samples._streams[0].tokens._file = FileIO(os.devnull)
        return at(loader, step, first_sample)

    if launch.rank in ranks:
        Loader.at = losing  # type: ignore[method-assign]


@pytest.mark.parametrize(("split", "ranks"), [("train", (1,)), ("train", (0, 1)), ("validation", (1,))])
def test_data_that_some_ranks_lose_are_named_once(split: str, ranks: tuple[int, ...], run_file: Path) -> None:
    done = forked(run_file, processes=2, spoil=partial(_lose_tokens, ranks=ranks, split=split))
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("raptr_ds: ") == done.stderr.count("raptr_ds: DataError") == 1
    assert f"{split}.bin has become shorter while it was read" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_exit_code_needs_no_reader_and_no_disk(run_file: Path, tmp_path: Path) -> None:
    """As with a batch job's output on the disk that the run has filled."""
    missing, whole = plain_command(tmp_path / "missing.json"), plain_command(run_file, "raptr_ds.log.progress=rich")
    with Path("/dev/full").open("w") as full:
        for command, code in ((missing, 2), (whole, 0)):
            done = subprocess.run(
                command, cwd=REPOSITORY, env=ENV, timeout=PATIENCE, stdout=full, stderr=full, check=False
            )
            assert done.returncode == code


def test_a_checkpoint_of_another_model(run_file: Path, tmp_path: Path) -> None:
    short = ["raptr_ds.train.steps=2", "raptr_ds.eval.batches=0", "raptr_ds.path.schedule=4"]
    assert forked(run_file, *short).returncode == 0
    other = [*short, "raptr_ds.model.hidden_size=64", f"raptr_ds.checkpoint.load={tmp_path}/run"]
    done = forked(run_file, *other, f"raptr_ds.train.save={tmp_path}/other")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "hidden_size" in done.stderr
    assert "64" in done.stderr
    assert "32" in done.stderr
