"""Small runs on prepared text, to measure at any depth."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.depth.source import ModelSource
from raptr_ds.model.stage import Stage
from raptr_ds.parallel.groups import ProcessGroups
from tests.exported_runs import model_of, run_folder

MakeRun = Callable[..., tuple[ModelSource, Stage]]


def depth_run(
    folder: Path,
    groups: ProcessGroups,
    tokenizer: Tokenizer,
    prepared: Path,
    kind: str,
    seq_length: int = 24,
    **settings: Any,
) -> Stage:
    """Write a run of a small model whose layers all matter, on a prepared data folder; return the model.

    settings: objects of its run file's block, besides `data.path`.
    """
    model = model_of(kind, tokenizer.vocab_size, num_layers=5, init_method_std=0.4, seq_length=seq_length)
    folder.parent.mkdir(exist_ok=True, parents=True)
    stage = run_folder(folder, groups, model, tokenizer)
    block = {**settings, "data": {"path": str(prepared), **settings.get("data", {})}}
    (folder / "config.json").write_text(json.dumps({"raptr_ds": block}))
    return stage


def along(stage: Stage, batches: Any, path: Any) -> float:
    """Return the mean loss along a path, by the model's own forward pass alone."""
    with torch.no_grad():
        losses = [stage(batch.tokens, batch, path, None).double() for batch in batches]
    return float(torch.cat(losses).mean())
