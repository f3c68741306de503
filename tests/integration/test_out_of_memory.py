"""A rank's device runs out of memory: it explains, no other hangs, and the exit code says whether steps are lost."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from raptr_ds.engine.zero import ZeroEngine
from raptr_ds.parallel.launch import Launch
from raptr_ds.runtime import setup
from tests.integration.conftest import forked, training_lines


def find_no_memory(launch: Launch, ranks: tuple[int, ...], step: int | None) -> None:
    """Let some ranks find no memory in a 0-based step, or None: when the engine is built."""
    build, train = setup.build_engine, ZeroEngine.train_step

    def fail() -> None:
        if launch.rank in ranks:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def build_engine(*arguments: Any) -> Any:
        if step is None:
            fail()
        return build(*arguments)

    def train_step(engine: ZeroEngine, batch: Any, path: Any, number: int, learning_rate: float) -> Any:
        if number == step:
            fail()
        return train(engine, batch, path, number, learning_rate)

    setup.build_engine, ZeroEngine.train_step = build_engine, train_step  # type: ignore[method-assign]


def run_short_of_memory(run_file: Path, ranks: tuple[int, ...], step: int | None, *settings: str) -> tuple[int, str]:
    """Run on two processes, of which some find no memory; both end by themselves, with the same exit code."""
    done = forked(run_file, *settings, processes=2, spoil=partial(find_no_memory, ranks=ranks, step=step))
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(("ranks", "step"), [((1,), 0), ((0, 1), 0), ((1,), None)])
def test_before_anything_is_trained_it_is_a_mistake_printed_once(run_file, tmp_path, ranks, step):
    code, output = run_short_of_memory(run_file, ranks, step)
    assert code == 2, output
    assert output.count("raptr_ds: DeviceMemoryError") == 1
    assert "Traceback" not in output
    for part in ("nothing is trained", "Tried to allocate 2.00 GiB", "MiB optimizer state", "of them logits"):
        assert part in output
    for remedy in ("train_micro_batch_size_per_gpu=1", "zero_optimization.stage=2", "activation_checkpointing=true"):
        assert remedy in output
    assert training_lines(tmp_path / "run") == []


def test_later_it_is_a_fault_and_the_run_goes_on_from_its_checkpoint(run_file, tmp_path):
    settings = ["raptr_ds.checkpoint.interval=2", "raptr_ds.train.steps=8"]
    code, output = run_short_of_memory(run_file, (1,), 6, *settings)
    assert code == 1, output
    assert output.count("raptr_ds: DeviceMemoryError: rank 1") == 1
    assert "after 6 steps of this start" in output
    assert "goes on from its newest checkpoint" in output
    done = forked(run_file, *settings, processes=2)
    assert done.returncode == 0, done.stderr
    # The last save, after 6 steps, has completed the one before it, and may not be complete itself.
    assert re.search("continuing after step [46]", done.stdout), done.stdout + done.stderr
    assert training_lines(tmp_path / "run")[-1]["step"] == 8
