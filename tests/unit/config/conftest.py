"""A small valid run file, and loading it with changes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raptr_ds.config.load import load_run_config
from raptr_ds.config.run import RunConfig

Load = Callable[..., RunConfig]


@pytest.fixture
def small_run() -> dict[str, Any]:
    """The smallest run file: everything else has a default or is derived."""
    return {
        "train_batch_size": 8,
        "raptr_ds": {
            "model": {
                "architecture": "bert",
                "num_layers": 12,
                "hidden_size": 48,
                "num_attention_heads": 4,
                "seq_length": 32,
            },
            "path": {"method": "raptr"},
            "data": {"path": "data/docs"},
            "train": {"steps": 100},
        },
    }


@pytest.fixture
def load(tmp_path: Path, small_run: dict[str, Any]) -> Load:
    """Write a run file (the smallest one unless given, or text as it is) and load it with overrides."""

    def load_it(*overrides: str, world_size: int = 1, tree: dict[str, Any] | None = None, text: str = "") -> RunConfig:
        file = tmp_path / "run.json"
        file.write_text(text or json.dumps(tree or small_run, indent=1), encoding="utf-8")
        return load_run_config(file, overrides, world_size)

    return load_it
