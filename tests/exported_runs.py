"""Small runs to export, and how a call of a tool ended."""

import json
import runpy
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from raptr_ds.checkpoint.manager import Checkpoints
from raptr_ds.config.sections import ModelSection
from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.engine.reference import ReferenceEngine
from raptr_ds.model.stage import Stage, build_stage
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.runtime.identity import IDENTITY

KINDS: dict[str, dict[str, Any]] = {
    "bert": {"architecture": "bert"},
    "rotary bert": {"architecture": "bert", "position_embedding": "rotary"},
    "ul2": {"architecture": "ul2"},
}


def model_of(kind: str, vocab_size: int, **changes: Any) -> ModelSection:
    """Return a small model."""
    shape = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "seq_length": 24}
    return ModelSection(vocab_size=vocab_size, **{**shape, **KINDS[kind], **changes})


def run_folder(
    folder: Path,
    groups: ProcessGroups,
    model: ModelSection,
    tokenizer: Tokenizer,
    recorded: Mapping[str, Any] | None = None,
) -> Stage:
    """Write a run with one checkpoint and return the model in it. recorded: more of the run's state."""
    stage = build_stage(model, groups, range(model.num_layers), recompute=False, seed=1)
    data = folder.parent / "data"
    data.mkdir()
    tokenizer.save(data / "tokenizer.model")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"raptr_ds": {"data": {"path": str(data)}}}))
    checkpoints = Checkpoints(folder / "checkpoints", groups, keep=2)
    state = {IDENTITY: {"tokenizer": tokenizer.digest}, **(recorded or {})}
    checkpoints.save(ReferenceEngine(stage, seed=1, skipped_update="freeze", max_norm=1.0), 3, model, state)
    checkpoints.wait()
    checkpoints.close()
    return stage


@dataclass(frozen=True)
class Done:
    """How a call of the tool ended."""

    code: object
    printed: str
    error: str


Tool = Callable[..., Done]
_TOOLS = Path(__file__).parents[1] / "tools"


def tool_runner(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tool:
    """Return what runs a tool, given by its name, in this process."""
    monkeypatch.syspath_prepend(str(_TOOLS))

    def run(name: str, *arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()  # what came before
        try:
            runpy.run_path(str(_TOOLS / name), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code
        written = capsys.readouterr()
        return Done(code, written.out, written.err)

    return run


def is_refused(done: Done, *words: object) -> bool:
    """Return whether the tool ended by one message of ours that has all of the words."""
    return done.code == 2 and done.error.startswith("error: ") and all(str(word) in done.error for word in words)
