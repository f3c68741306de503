"""Whole runs through the command line: what a run leaves behind, in all layouts, by all launchers, and continuing."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from raptr_ds.theory.transitions import transitions_of
from tests.integration.conftest import (
    ENV,
    RANK_KEYS,
    REPOSITORY,
    call,
    deepspeed_command,
    forked,
    lines_of,
    plain_command,
    tiny_run,
    torchrun_command,
    training_lines,
)

TRAINING_KEYS = {
    "step",
    "loss",
    "lr",
    "grad_norm",
    "path",
    "path_length",
    "phase",
    "tokens",
    "flops",
    "skipped_steps",
    "step_seconds",
    "tokens_per_second",
    "mfu",
}


def test_a_run_leaves_what_the_contract_says(run_file: Path, tmp_path: Path) -> None:
    done = call(deepspeed_command(run_file))
    assert done.returncode == 0, done.stdout + done.stderr
    save = tmp_path / "run"
    training = training_lines(save)
    assert [line["step"] for line in training] == list(range(1, 13))
    assert all(line.keys() - RANK_KEYS == TRAINING_KEYS for line in training)
    assert [line["path_length"] for line in training] == [2] * 4 + [3] * 4 + [4] * 4
    assert all(0 in line["path"] and 3 in line["path"] for line in training)
    assert [line["tokens"] for line in training] == [4 * 32 * step for step in range(1, 13)]
    assert training[-1]["loss"] < training[0]["loss"]
    evaluation = lines_of(save)[-1]
    assert evaluation.keys() == {"step", "eval_loss", "path_length"}
    assert (evaluation["step"], evaluation["path_length"]) == (12, 4)
    assert list((save / "tensorboard").iterdir())
    assert [path.name for path in (save / "checkpoints").iterdir()] == ["step-00000012"]
    resolved = json.loads((save / "config.json").read_text())
    assert resolved["raptr_ds"]["model"]["vocab_size"] == 600
    assert resolved["gradient_accumulation_steps"] >= 1
    assert "checkpoint of step 12" in done.stdout

    before = (save / "metrics.jsonl").read_bytes()
    again = call(plain_command(run_file))
    assert again.returncode == 0, again.stdout + again.stderr
    loss = f"held-out loss {evaluation['eval_loss']:.4f} after step 12"
    assert f"this run is complete: 12 of 12 steps are trained; {loss}. Raise" in again.stdout
    assert "continuing" not in again.stdout
    assert (save / "metrics.jsonl").read_bytes() == before


def test_the_resolved_configuration_is_a_run_file_with_the_same_outcome(run_file: Path, tmp_path: Path) -> None:
    settings = ["raptr_ds.train.steps=3", "raptr_ds.eval.batches=0"]
    assert forked(run_file, *settings).returncode == 0
    again = forked(tmp_path / "run" / "config.json", f"raptr_ds.train.save={tmp_path}/again")
    assert again.returncode == 0, again.stderr
    first, second = training_lines(tmp_path / "run"), training_lines(tmp_path / "again")
    assert [line["loss"] for line in first] == [line["loss"] for line in second]


@pytest.mark.parametrize(
    ("architecture", "path", "layout"),
    [
        # A balance of its own: one process would balance over one stage.
        ("bert", {"sampling": "balanced", "balance_stages": 2}, ["raptr_ds.parallel.pipeline_model_parallel_size=2"]),
        ("bert", {"paths_per_step": 2}, ["raptr_ds.parallel.pipeline_model_parallel_size=2"]),
        ("ul2", {}, ["raptr_ds.parallel.tensor_model_parallel_size=2"]),
        ("bert", {}, ["raptr_ds.parallel.tensor_model_parallel_size=2", "raptr_ds.parallel.sequence_parallel=true"]),
        ("ul2", {}, ["zero_optimization.stage=3"]),
        ("bert", {}, ["zero_optimization.stage=2", "raptr_ds.parallel.micro_batches=[2, 2, 1]"]),
    ],
)
def test_a_layout_writes_the_losses_of_one_process(
    architecture: str, path: dict[str, Any], layout: list[str], data_folder: Path, tmp_path: Path
) -> None:
    """Tolerance: fp32 summed in other orders over 6 steps, 1e-6 each at the most."""
    for name in ("one", "two"):
        changes = {"train": {"steps": 6}, "model": {"architecture": architecture, "num_layers": 5}}
        tree = tiny_run(data_folder, tmp_path / name, **changes, path={"schedule": "3-4-5", **path})
        run = tmp_path / f"{name}.json"
        run.write_text(json.dumps({**tree, "train_micro_batch_size_per_gpu": 1}))
        done = forked(run) if name == "one" else forked(run, *layout, processes=2)
        assert done.returncode == 0, done.stdout + done.stderr
    one, two = (lines_of(tmp_path / name) for name in ("one", "two"))
    assert [line["step"] for line in one] == [1, 2, 3, 4, 5, 6, 6]
    losses = ([line.get("loss", line.get("eval_loss")) for line in lines] for lines in (one, two))
    assert next(losses) == pytest.approx(next(losses), rel=6e-6)
    for key in ("path", "paths", "path_length", "flops"):
        assert [line.get(key) for line in two] == [line.get(key) for line in one], key
    assert {len(line["paths"]) for line in one if "paths" in line} == ({2} if "paths_per_step" in path else set())


def test_a_longer_run_continues_a_finished_one_bit_for_bit(run_file: Path, tmp_path: Path) -> None:
    """Two halves equal the whole: same layout, so the losses are the same numbers."""
    fixed_rate = ["raptr_ds.eval.batches=0", "raptr_ds.checkpoint.interval=5", "raptr_ds.path.schedule=3-4"]
    whole = forked(run_file, *fixed_rate, f"raptr_ds.train.save={tmp_path}/whole", processes=2)
    assert whole.returncode == 0, whole.stderr
    half = forked(run_file, *fixed_rate, processes=2)
    assert half.returncode == 0, half.stderr
    newest = tmp_path / "run" / "checkpoints" / "step-00000012"
    weights = newest / "rank-00000.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-100] ^= 1  # the newest is damaged: the one before is used, and the steps after it are trained again
    weights.write_bytes(damaged)
    again = call(torchrun_command(run_file, *fixed_rate))
    assert again.returncode == 0, again.stdout + again.stderr
    assert "damaged" in again.stdout
    assert "continuing after step 10" in again.stdout
    expected, found = training_lines(tmp_path / "whole"), training_lines(tmp_path / "run")
    assert [line["step"] for line in found] == list(range(1, 13))
    for key in ("loss", "grad_norm", "lr", "path", "tokens", "flops"):
        assert [line[key] for line in found] == [line[key] for line in expected], key


def test_the_example_of_the_contract_runs(data_folder: Path, tmp_path: Path) -> None:
    """A run needs only what differs: a big run file made small by --set."""
    settings = [
        "raptr_ds.model.num_layers=5",
        "raptr_ds.model.hidden_size=32",
        "raptr_ds.model.num_attention_heads=2",
        "raptr_ds.model.seq_length=64",
        "train_batch_size=8",
        "train_micro_batch_size_per_gpu=2",
        "raptr_ds.train.steps=3",
        f"raptr_ds.train.save={tmp_path}/run",
        f"raptr_ds.data.path={data_folder}",
        "raptr_ds.eval.batches=1",
    ]
    done = call(plain_command(REPOSITORY / "deepspeed_configs" / "ul2_1b_raptr.json", *settings))
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(training_lines(tmp_path / "run")) == 3
    assert ENV["OMP_NUM_THREADS"] == "1"


def test_a_stacked_run_goes_on_from_a_growth_in_another_layout(data_folder: Path, tmp_path: Path) -> None:
    """A checkpoint of the step before a growth holds no new layer yet: the resumed run grows again."""
    run, save = tmp_path / "run.json", tmp_path / "run"
    changes = {
        "path": {"method": "stacking", "schedule": "1-2-4", "growth_warmup_steps": 2},
        "eval": {"interval": 2, "batches": 1},
        "checkpoint": {"interval": 4, "keep": 3},
    }
    run.write_text(json.dumps(tiny_run(data_folder, save, **changes)))
    whole = forked(run)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    expected = lines_of(save)
    for step in (8, 12):
        shutil.rmtree(save / "checkpoints" / f"step-{step:08}")
    again = forked(run, "raptr_ds.parallel.pipeline_model_parallel_size=2", processes=2)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "continuing after step 4" in again.stdout
    found = lines_of(save)
    assert [line["path_length"] for line in found if "loss" in line] == [1] * 4 + [2] * 4 + [4] * 4
    assert [(line["step"], line["path_length"]) for line in found if "eval_loss" in line] == [
        (2, 1), (4, 1), (6, 2), (8, 2), (10, 4), (12, 4),
    ]  # fmt: skip
    for key in ("loss", "grad_norm", "eval_loss", "lr"):
        assert [line[key] for line in found if key in line] == pytest.approx(
            [line[key] for line in expected if key in line], rel=6e-6
        )
    rates = [line["lr"] for line in found if "loss" in line]
    assert rates == [1e-3] * 4 + [5e-4, 1e-3, 1e-3, 1e-3] * 2


@pytest.mark.parametrize(
    ("path", "lengths"),
    [
        ({"schedule": "0-4", "split": [0.7, 0.3], "growth_init": "random"}, [0] * 8 + [4] * 4),
        ({"schedule": "1-4", "split": [0.7, 0.3], "growth_init": "zero"}, [1] * 8 + [4] * 4),
        ({"schedule": "1-2-4", "split": "power:1", "growth_position": "middle"}, [1] * 2 + [2] * 4 + [4] * 6),
    ],
    ids=["zero layers", "one layer", "midas"],
)
def test_later_ways_to_grow_go_on_in_another_layout(
    path: dict[str, Any], lengths: list[int], data_folder: Path, tmp_path: Path
) -> None:
    """With a warm-up, stable, decay rate, which goes on as if nothing had been between."""
    run, save = tmp_path / "run.json", tmp_path / "run"
    changes = {"path": {"method": "stacking", **path}, "checkpoint": {"interval": lengths.count(lengths[0]), "keep": 9}}
    tree = tiny_run(data_folder, save, **changes)
    params = {"warmup_num_steps": 2, "warmup_type": "linear", "decay_num_steps": 3}
    run.write_text(json.dumps({**tree, "scheduler": {"type": "WarmupStableDecayLR", "params": params}}))
    whole = forked(run)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    expected = lines_of(save)
    assert [line["path_length"] for line in expected if "loss" in line] == lengths
    growth = lengths.count(lengths[0])
    for folder in (save / "checkpoints").iterdir():
        if folder.name > f"step-{growth:08}":
            shutil.rmtree(folder)
    again = forked(run, "raptr_ds.parallel.pipeline_model_parallel_size=2", processes=2)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"continuing after step {growth}" in again.stdout
    found = lines_of(save)
    for key in ("loss", "grad_norm", "eval_loss"):
        assert [line[key] for line in found if key in line] == pytest.approx(
            [line[key] for line in expected if key in line], rel=6e-6
        )
    rates = [line["lr"] for line in found if "loss" in line]
    assert rates == pytest.approx([5e-4, *[1e-3] * 9, 2e-3 / 3, 1e-3 / 3])


def test_the_loss_at_a_runs_phase_transitions_is_measured(data_folder: Path, tmp_path: Path) -> None:
    run, save = tmp_path / "run.json", tmp_path / "run"
    changes = {"eval": {"interval": 4, "batches": 2}, "checkpoint": {"interval": 4, "keep": 3}}
    run.write_text(json.dumps(tiny_run(data_folder, save, **changes)))
    assert forked(run).returncode == 0
    evaluated = {line["step"]: line["eval_loss"] for line in lines_of(save) if "eval_loss" in line}
    found = transitions_of(save, num_paths=4, num_batches=2)
    assert [(one.step, one.before, one.after) for one in found] == [(4, 2, 3), (8, 3, 4)]
    assert [one.full_loss for one in found] == pytest.approx([evaluated[4], evaluated[8]], rel=1e-6)
    # Layers 0 and 3 are fixed: one path of two layers, at most two of three, one of four: the full model.
    assert [len(one.before_losses) for one in found] == [1, len(found[0].after_losses)]
    assert found[1].after_losses == (found[1].full_loss,)
    assert found[1].gap == pytest.approx(found[1].full_loss - sum(found[1].before_losses) / len(found[1].before_losses))
    shutil.rmtree(save / "checkpoints" / "step-00000008")
    shutil.rmtree(save / "checkpoints" / "step-00000004")
    command = [sys.executable, "tools/theory.py", "transitions", str(save), "--plot", str(tmp_path / "plot.png")]
    refused = call(command)
    assert refused.returncode == 2
    assert "no checkpoint of a step between two phases (4, 8)" in refused.stderr
