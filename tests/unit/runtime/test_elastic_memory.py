"""Which restarts ask for other sizes, and what they print; the GPU is made up, the planner's process is not."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from raptr_ds.config.load import load_run_config
from raptr_ds.parallel.launch import Launch
from raptr_ds.runtime import elastic_memory, planner_process
from raptr_ds.runtime.elastic_memory import fitted_to_memory
from raptr_ds.runtime.out_of_memory import DeviceMemory

RUN_FILE = Path(__file__).parents[3] / "deepspeed_configs" / "ul2_1b_raptr.json"
GROUPS = cast(Any, SimpleNamespace(device=torch.device("cpu")))


@pytest.fixture
def restart(monkeypatch, tmp_path):
    """Return what a restart on 8 GPUs of some GiB makes of a run, and the lines that it prints."""
    monkeypatch.setattr(elastic_memory, "on_first_rank", lambda groups, action: action())

    def start(gib: float | None, started_on: int = 16, restart_count: int = 1) -> tuple[Any, Any, list[str]]:
        sizes = ["raptr_ds.model.vocab_size=32000", "train_batch_size=256", "train_micro_batch_size_per_gpu=8"]
        config = load_run_config(RUN_FILE, [*sizes, f"raptr_ds.train.save={tmp_path}"], 8)
        starts = [
            {"time": "", "event": "start", "world_size": started_on, "restart_count": 0},
            {"time": "", "event": "start", "world_size": 8, "restart_count": 1},  # not the user's
        ]
        (tmp_path / "events.jsonl").write_text("".join(json.dumps(one) + "\n" for one in starts))
        device = None if gib is None else DeviceMemory("a GPU", int(gib * 2**30))
        monkeypatch.setattr(DeviceMemory, "of", classmethod(lambda cls, device_: device))
        launch = Launch(0, 0, 8, "127.0.0.1", 0, "slurm", restart_count)
        lines: list[str] = []
        return config, fitted_to_memory(config, GROUPS, launch, lines.append), lines

    return start


def test_a_gpu_that_the_shares_have_outgrown(restart):
    config, fitted, lines = restart(24)
    assert (fitted.zero_stage, fitted.batch.micro_batch) != (config.zero_stage, config.batch.micro_batch)
    assert fitted.batch.global_batch == 256 == fitted.batch.micro_batch * fitted.batch.accumulation * 8
    assert f"zero_optimization.stage={fitted.zero_stage}, train_micro_batch_size_per_gpu=" in lines[0]
    assert "24.0 GiB (a GPU) by the plan" in lines[0]


@pytest.mark.parametrize(
    "how", [{"gib": None}, {"gib": 500}, {"gib": 24, "started_on": 8}, {"gib": 24, "restart_count": 0}]
)
def test_what_stays_as_it_is(restart, how):
    """A CPU; enough memory; as many processes as the user's start, whatever came between; the user's own start."""
    config, fitted, lines = restart(**how)
    assert fitted is config
    assert lines == []


def test_nothing_that_fits_is_a_warning(restart):
    _, fitted, lines = restart(1)
    assert fitted.batch.micro_batch == 1
    assert lines[0].startswith("warning: on this number of GPUs no ZeRO stage and micro batch fit")


def test_a_planner_that_fails_changes_nothing(restart, monkeypatch):
    monkeypatch.setattr(planner_process, "_SECONDS", 0.001)
    config, fitted, lines = restart(24)
    assert fitted is config
    assert lines[0].startswith("warning: the memory plan could not be made")
