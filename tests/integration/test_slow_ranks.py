"""A rank that is slower than the others is named, wherever in a step it loses its time, at each ZeRO stage."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raptr_ds.data.loader import Loader
from raptr_ds.model.stage import Stage
from raptr_ds.parallel.launch import Launch
from tests.integration.conftest import forked, training_lines

SLEEP_SECONDS = 0.2
STEPS = "raptr_ds.train.steps=25"


def _delay(owner: Any, name: str, seconds: float = SLEEP_SECONDS) -> None:
    """Make a method take longer."""
    method = getattr(owner, name)

    def slow(*args: Any, **more: Any) -> Any:
        time.sleep(seconds)
        return method(*args, **more)

    setattr(owner, name, slow)


def _slow_forward_pass(launch: Launch) -> None:
    if launch.rank == 1:
        _delay(Stage, "forward")


def _slow_data(launch: Launch) -> None:
    if launch.rank == 1:
        _delay(Loader, "at")


def _slow_optimizer(launch: Launch) -> None:
    """ZeRO steps each of its groups, of which every layer has one or two."""
    if launch.rank == 1:
        _delay(torch.optim.AdamW, "step", SLEEP_SECONDS / 5)


def _slow_backward_pass(launch: Launch) -> None:
    """Delay a gradient hook: the pass runs in C++."""
    if launch.rank != 1:
        return
    forward = Stage.forward

    def slow(stage: Stage, *args: Any) -> torch.Tensor:
        loss = forward(stage, *args)
        if loss.requires_grad:
            loss.register_hook(lambda _: time.sleep(SLEEP_SECONDS))
        return loss

    Stage.forward = slow  # type: ignore[method-assign]


def _slow_pulses(launch: Launch) -> None:
    """Lose all of the time in one step of five."""
    if launch.rank != 1:
        return
    at = Loader.at

    def slow(loader: Loader, step: int, first_sample: int | None = None) -> Any:
        time.sleep(SLEEP_SECONDS * 5 * (step % 5 == 0))
        return at(loader, step, first_sample)

    Loader.at = slow  # type: ignore[method-assign]


def _slow_first_stage(launch: Launch) -> None:
    if launch.rank == 0:
        _delay(Stage, "forward")


def _slow_everywhere(launch: Launch) -> None:
    _delay(Stage, "forward")


def _named(save: Path) -> list[int | None]:
    """Return the slowest rank of each training line."""
    return [line.get("slowest_rank") for line in training_lines(save)]


def _events(save: Path) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in (save / "events.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "slow_rank"]


@pytest.mark.parametrize(
    ("stage", "spoil"),
    [
        (0, _slow_forward_pass),
        (0, _slow_pulses),
        (1, _slow_data),
        (1, _slow_optimizer),
        (3, _slow_forward_pass),
        (3, _slow_backward_pass),
    ],
)
def test_a_slow_rank_is_named(stage: int, spoil: Callable[[Launch], None], run_file: Path, tmp_path: Path) -> None:
    settings = (STEPS, "train_batch_size=6", f"zero_optimization.stage={stage}")
    done = forked(run_file, *settings, processes=3, spoil=spoil)
    assert done.returncode == 0, done.stderr
    lines = training_lines(tmp_path / "run")
    assert _named(tmp_path / "run")[:3] == [None] * 3  # the first step compiles; numbers come two steps later
    later = lines[3:]
    own = [line["slowest_rank_seconds"] for line in later]
    others = [line["median_rank_seconds"] for line in later]
    if spoil is not _slow_pulses:  # a busy machine may hold up another rank in a step or two
        assert [line["slowest_rank"] for line in later].count(1) >= 18
    assert sum(own) > 0.9 * len(own) * SLEEP_SECONDS
    assert sum(others) < 0.7 * sum(own)  # the rest of each step they waited for rank 1
    (event,) = _events(tmp_path / "run")
    assert event["step"] == 23
    assert event["rank"] == 1
    assert event["seconds"] > 1.5 * event["median"]
    assert "rank 1 slow (" in done.stdout  # in the last step's line


def test_of_two_pipeline_stages_the_slow_one_is_named(run_file: Path, tmp_path: Path) -> None:
    settings = (STEPS, "raptr_ds.parallel.pipeline_model_parallel_size=2")
    done = forked(run_file, *settings, processes=2, spoil=_slow_first_stage)
    assert done.returncode == 0, done.stderr
    (event,) = _events(tmp_path / "run")
    assert event["rank"] == 0
    assert event["median"] < SLEEP_SECONDS < event["seconds"]


@pytest.mark.parametrize("stage", [0, 3])
def test_equal_ranks_are_not_called_slow(stage: int, run_file: Path, tmp_path: Path) -> None:
    """All lose the same time, so that what else the machine does hardly counts."""
    done = forked(run_file, STEPS, f"zero_optimization.stage={stage}", processes=2, spoil=_slow_everywhere)
    assert done.returncode == 0, done.stderr
    assert not _events(tmp_path / "run")
    assert " slow (" not in done.stdout
    lines = training_lines(tmp_path / "run")[3:]
    assert all("slowest_rank" in line for line in lines)


def test_one_rank_has_no_slowest(run_file: Path, tmp_path: Path) -> None:
    assert forked(run_file).returncode == 0
    assert set(_named(tmp_path / "run")) == {None}
