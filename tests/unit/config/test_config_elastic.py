"""A run that is started again on another number of processes keeps its global batch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raptr_ds.config.load import load_run_config
from raptr_ds.errors import ConfigError

Started = Callable[..., Path]


@pytest.fixture
def started(tmp_path: Path, small_run: dict[str, Any]) -> Started:
    """Write the smallest run file with batch sizes, start it once on `world_size` processes, and return the file."""

    def start(world_size: int, *overrides: str, **sizes: Any) -> Path:
        path = tmp_path / "run.json"
        tree = {key: value for key, value in small_run.items() if key != "train_batch_size"}
        tree["raptr_ds"]["train"]["save"] = str(tmp_path / "run")
        path.write_text(json.dumps({**tree, **sizes}))
        config = load_run_config(path, overrides, world_size)
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "config.json").write_text(json.dumps(config.resolved()))
        return path

    return start


GIVEN = [
    {"train_batch_size": 48},
    {"train_batch_size": 48, "train_micro_batch_size_per_gpu": 6},
    {"train_micro_batch_size_per_gpu": 6, "gradient_accumulation_steps": 2},
    {"train_batch_size": 48, "train_micro_batch_size_per_gpu": 6, "gradient_accumulation_steps": 2},
]


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8, 12, 16, 24, 48])
def test_the_global_batch_stays_and_no_micro_batch_is_larger(
    given: dict[str, int], world_size: int, started: Started
) -> None:
    path = started(4, **given)
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
    world_size: int, fits: str, started: Started
) -> None:
    path = started(4, train_batch_size=48, train_micro_batch_size_per_gpu=6)
    with pytest.raises(ConfigError, match=rf"started again on {world_size} processes.*batch of 48.*{fits}\."):
        load_run_config(path, (), world_size, is_restart=True)


def test_a_run_that_comes_back_to_fewer_ranks_has_its_micro_batches_again(started: Started, tmp_path: Path) -> None:
    """config.json is of the last start; what the user gave still holds."""
    path = started(4, train_batch_size=48, train_micro_batch_size_per_gpu=6)
    for world_size, micro in ((16, 3), (8, 6), (48, 1), (4, 6)):
        config = load_run_config(path, (), world_size, is_restart=True)
        assert config.batch.micro_batch == micro
        (tmp_path / "run" / "config.json").write_text(json.dumps(config.resolved()))


@pytest.mark.parametrize("given", GIVEN)
def test_a_second_start_on_the_other_number_of_ranks_keeps_the_batch_too(
    given: dict[str, int], started: Started, tmp_path: Path
) -> None:
    """A run file of micro batches and accumulation alone would give half of the batch on half of the ranks."""
    path = started(4, **given)
    first = load_run_config(path, (), 2, is_restart=True)
    (tmp_path / "run" / "config.json").write_text(json.dumps(first.resolved()))
    assert load_run_config(path, (), 2, is_restart=True).batch == first.batch
    assert first.batch.global_batch == 48


def test_a_batch_that_the_user_has_changed_since_is_taken(started: Started) -> None:
    path = started(4, train_batch_size=48, train_micro_batch_size_per_gpu=6)
    assert load_run_config(path, ["train_batch_size=96"], 4, is_restart=True).batch.global_batch == 96
    assert load_run_config(path, ["train_batch_size=96"], 16, is_restart=True).batch.global_batch == 96


def test_copies_of_the_model_take_several_processes(started: Started) -> None:
    tensor = "raptr_ds.parallel.tensor_model_parallel_size=2"
    path = started(8, tensor, train_batch_size=48, train_micro_batch_size_per_gpu=6)
    assert load_run_config(path, [tensor], 4, is_restart=True).batch.data_parallel == 2
    with pytest.raises(ConfigError, match=r"5 data-parallel ranks.*of processes: 2, 4, 6, 8, 12, 16\."):
        load_run_config(path, [tensor], 10, is_restart=True)
    with pytest.raises(ConfigError, match="Start a multiple of 2 processes"):
        load_run_config(path, [tensor], 5, is_restart=True)


def test_micro_batches_of_phases_and_paths_of_a_step_still_divide(started: Started) -> None:
    phases = ["raptr_ds.path.method=raptr", "raptr_ds.path.schedule=6-12", "raptr_ds.parallel.micro_batches=[12,6]"]
    path = started(4, *phases, train_batch_size=48, train_micro_batch_size_per_gpu=6)
    config = load_run_config(path, phases, 16, is_restart=True)
    assert (config.parallel.micro_batches, config.batch.micro_batch) == ((3, 3), 3)
    paths = ["raptr_ds.path.method=layerdrop", "raptr_ds.path.paths_per_step=2"]
    path = started(4, *paths, train_batch_size=48, train_micro_batch_size_per_gpu=6)
    config = load_run_config(path, paths, 12, is_restart=True)
    assert (config.batch.micro_batch, config.batch.accumulation) == (2, 2)


def test_a_first_start_and_one_by_the_user_are_as_the_file_says(started: Started, tmp_path: Path) -> None:
    path = started(4, train_batch_size=48, train_micro_batch_size_per_gpu=6)
    with pytest.raises(ConfigError, match="must be a multiple of"):
        load_run_config(path, (), 16)
    for nothing_on_record in ("{}", "[" * 100_000):
        (tmp_path / "run" / "config.json").write_text(nothing_on_record)
        with pytest.raises(ConfigError, match="must be a multiple of"):
            load_run_config(path, (), 16, is_restart=True)
