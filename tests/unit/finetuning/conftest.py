"""What the tests of fine-tuning share: small exported encoders and a task of the user's own."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.finetuning.encoder import Encoder, exported_encoder
from raptr_ds.hf.export import export
from raptr_ds.parallel.groups import ProcessGroups
from tests.exported_runs import model_of, run_folder

WORDS = ["cat", "dog", "house", "tree", "river", "stone", "cloud", "bread"]


@pytest.fixture
def run(tmp_path: Path, groups: ProcessGroups, tokenizer: Tokenizer) -> Callable[[str], Path]:
    """Makes a run of a small model of a kind."""

    def make(kind: str) -> Path:
        model = model_of(kind, tokenizer.vocab_size, hidden_dropout=0.0, attention_dropout=0.0)
        run_folder(tmp_path / "run", groups, model, tokenizer)
        return tmp_path / "run"

    return make


@pytest.fixture
def exported(run: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """Makes an exported folder of a small model of a kind."""
    import torch

    def make(kind: str) -> Path:
        export(run(kind), tmp_path / "model", torch.float32)
        return tmp_path / "model"

    return make


@pytest.fixture
def encoder(exported: Callable[[str], Path], request: pytest.FixtureRequest) -> Encoder:
    """The exported encoder of the kind that the test names, bert without a name."""
    return exported_encoder(exported(getattr(request, "param", "bert")))


def sentences(num: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows of text whose label is whether they begin with "dog"."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(num):
        words = rng.choice(WORDS, 4).tolist()
        words[0] = "dog" if number % 2 else "cat"
        rows.append({"text": " ".join(words), "label": ["no", "yes"][number % 2]})
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON lines or CSV, by the file's ending."""
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            table = csv.DictWriter(stream, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
