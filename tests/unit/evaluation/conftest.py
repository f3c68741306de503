"""What the tests of evaluation share: a small model, exported, and task files."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from lm_eval.tasks import TaskManager

from raptr_ds.evaluation import catalogue
from raptr_ds.hf.export import export
from raptr_ds.hf.load import PrefixModel, load_prefix_model
from raptr_ds.parallel.groups import lone_process_groups
from tests.small_tasks import write_run, write_task_files


@pytest.fixture(autouse=True)
def _own_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what a tool leaves in the environment: accelerate, in the harness's own class, would join that launch."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def make_harness() -> Callable[[], TaskManager]:
    """What lists the harness's tasks when it is first called; it parses 14,000 files."""
    return cache(TaskManager)


@pytest.fixture(autouse=True)
def _listed_once(make_harness: Callable[[], TaskManager], monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the same list to every catalogue that wants it."""
    monkeypatch.setattr(catalogue, "TaskManager", make_harness)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a small UL2 model."""
    with lone_process_groups() as groups:
        return write_run(tmp_path_factory.mktemp("evaluated"), groups)


@pytest.fixture(scope="session")
def exported(run: Path) -> Path:
    """The same model in a folder for transformers."""
    export(run, run.parent / "exported", torch.float32)
    return run.parent / "exported"


@pytest.fixture(scope="session")
def loaded(exported: Path) -> PrefixModel:
    """The same model in memory; tests that change its weights' type work on a copy."""
    return load_prefix_model(exported)


@pytest.fixture(scope="session")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of some of the harness's tasks."""
    return write_task_files(tmp_path_factory.mktemp("tasks"))
