"""tools/export_hf.py --check: whether a run can be exported, from its config.json alone."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from raptr_ds.data.tokenizer import Tokenizer
from tests.exported_runs import KINDS, Tool, is_refused, model_of

pytestmark = pytest.mark.parametrize("tokenizer", ["bpe"], indirect=True)


@pytest.fixture
def config(tmp_path: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """The part of a run's config.json that decides."""
    tokenizer.save(tmp_path / "tokenizer.model")
    model = model_of("ul2", tokenizer.vocab_size).model_dump(mode="json")
    return {"raptr_ds": {"model": model, "data": {"path": str(tmp_path)}}}


@pytest.mark.parametrize("kind", KINDS)
def test_what_can_be_exported(
    kind: str, config: dict[str, Any], tokenizer: Tokenizer, export: Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config["raptr_ds"]["model"] = model_of(kind, tokenizer.vocab_size).model_dump(mode="json")
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(config)))
    done = export("--check", "-")
    assert (done.code, done.error) == (0, "")
    assert done.printed == "this run can be exported\n"


def test_what_cannot(tmp_path: Path, config: dict[str, Any], export: Tool) -> None:
    file = tmp_path / "config.json"
    assert is_refused(export("--check", file), file, "FileNotFoundError")
    file.write_text("[]")
    assert is_refused(export("--check", file), file, "not the config.json of a run")
    config["raptr_ds"]["model"]["normalization"] = "layernorm"
    file.write_text(json.dumps(config))
    assert is_refused(export("--check", file), "raptr_ds.model.normalization=layernorm", "cannot be exported")
    config["raptr_ds"]["model"]["normalization"] = "rmsnorm"
    config["raptr_ds"]["data"]["tokenizer"] = str(tmp_path / "gone.model")
    file.write_text(json.dumps(config))
    assert is_refused(export("--check", file), tmp_path / "gone.model")


def test_an_export_needs_a_folder_to_write(tmp_path: Path, tokenizer: Tokenizer, export: Tool) -> None:
    assert tokenizer.vocab_size
    done = export(tmp_path)
    assert done.code == 2
    assert "OUTPUT" in done.error
