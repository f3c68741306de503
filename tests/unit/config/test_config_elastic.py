"""A run that is started again on another number of processes keeps its global batch."""

import json
from pathlib import Path
from typing import Any

import pytest

from raptr_ds.config.load import load_run_config
from raptr_ds.errors import ConfigError


def started(tmp_path: Path, world_size: int, *overrides: str, **sizes: Any) -> Path:
    """Write a run file, start it once on `world_size` processes, and return the file."""
    block = {
        "model": {
            "architecture": "bert",
            "num_layers": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "seq_length": 32,
        },
        "data": {"path": "data"},
        "train": {"steps": 12, "save": str(tmp_path / "run")},
    }
    path = tmp_path / "run.json"
    optimizer = {"type": "AdamW", "params": {"lr": 1e-3}}
    path.write_text(json.dumps({**sizes, "optimizer": optimizer, "raptr_ds": block}))
    config = load_run_config(path, overrides, world_size)
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "config.json").write_text(json.dumps(config.resolved()))
    return path


GIVEN = [
    {"train_batch_size": 48},
    {"train_batch_size": 48, "train_micro_batch_size_per_gpu": 6},
    {"train_micro_batch_size_per_gpu": 6, "gradient_accumulation_steps": 2},
    {"train_batch_size": 48, "train_micro_batch_size_per_gpu": 6, "gradient_accumulation_steps": 2},
]


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8, 12, 16, 24, 48])
def test_the_global_batch_stays_and_no_micro_batch_is_larger(
    given: dict[str, int], world_size: int, tmp_path: Path
) -> None:
    path = started(tmp_path, 4, **given)
    first = load_run_config(path, (), 4)
    config = load_run_config(path, (), world_size, is_restart=True)
    assert config.batch.global_batch == 48
    assert config.batch.micro_batch * config.batch.accumulation * world_size == 48
    assert config.batch.micro_batch <= first.batch.micro_batch
    assert any("started again" in line for line in config.derived) == (world_size != 4)
    if world_size == 8:
        assert config.batch.micro_batch == 6
    if world_size == 16:
        assert config.batch.micro_batch == 3


@pytest.mark.parametrize(("world_size", "fits"), [(5, "1, 2, 3, 4, 6, 8"), (7, "1, 2, 3, 4, 6, 8, 12"), (32, "24, 48")])
def test_what_cannot_share_the_batch_is_refused_with_the_sizes_that_can(
    world_size: int, fits: str, tmp_path: Path
) -> None:
    path = started(tmp_path, 4, train_batch_size=48, train_micro_batch_size_per_gpu=6)
    with pytest.raises(ConfigError, match=rf"started again on {world_size} processes.*batch of 48.*{fits}\."):
        load_run_config(path, (), world_size, is_restart=True)


def test_copies_of_the_model_take_several_processes(tmp_path: Path) -> None:
    tensor = "raptr_ds.parallel.tensor_model_parallel_size=2"
    path = started(tmp_path, 8, tensor, train_batch_size=48, train_micro_batch_size_per_gpu=6)
    assert load_run_config(path, [tensor], 4, is_restart=True).batch.data_parallel == 2
    with pytest.raises(ConfigError, match=r"5 data-parallel ranks.*of processes: 2, 4, 6, 8, 12, 16\."):
        load_run_config(path, [tensor], 10, is_restart=True)
    with pytest.raises(ConfigError, match="Start a multiple of 2 processes"):
        load_run_config(path, [tensor], 5, is_restart=True)


def test_micro_batches_of_phases_and_paths_of_a_step_still_divide(tmp_path: Path) -> None:
    phases = ["raptr_ds.path.method=raptr", "raptr_ds.path.schedule=2-4", "raptr_ds.parallel.micro_batches=[12,6]"]
    path = started(tmp_path, 4, *phases, train_batch_size=48, train_micro_batch_size_per_gpu=6)
    config = load_run_config(path, phases, 16, is_restart=True)
    assert (config.parallel.micro_batches, config.batch.micro_batch) == ((3, 3), 3)
    paths = ["raptr_ds.path.method=layerdrop", "raptr_ds.path.paths_per_step=2"]
    path = started(tmp_path, 4, *paths, train_batch_size=48, train_micro_batch_size_per_gpu=6)
    config = load_run_config(path, paths, 12, is_restart=True)
    assert (config.batch.micro_batch, config.batch.accumulation) == (2, 2)


def test_a_first_start_and_one_by_the_user_are_as_the_file_says(tmp_path: Path) -> None:
    path = started(tmp_path, 4, train_batch_size=48, train_micro_batch_size_per_gpu=6)
    with pytest.raises(ConfigError, match="must be a multiple of"):
        load_run_config(path, (), 16)
    (tmp_path / "run" / "config.json").write_text("{}")  # nothing on record
    with pytest.raises(ConfigError, match="must be a multiple of"):
        load_run_config(path, (), 16, is_restart=True)
