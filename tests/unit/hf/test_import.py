"""Folders of transformers as checkpoints: ours there and back bit for bit, foreign ones with the same logits."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    EsmConfig,
    EsmForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    MegatronBertConfig,
    MegatronBertForMaskedLM,
    PreTrainedModel,
)

from raptr_ds.checkpoint.manager import Checkpoints
from raptr_ds.checkpoint.weights import load_trained_model
from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.engine.reference import ReferenceEngine
from raptr_ds.errors import CheckpointError
from raptr_ds.hf.model import to_hugging_face
from raptr_ds.model.stage import build_stage
from raptr_ds.parallel.groups import ProcessGroups, lone_process_groups
from raptr_ds.runtime.identity import IDENTITY, Identity, changes_since
from raptr_ds.runtime.state import OPTIMIZER, RunState
from tests.exported_runs import KINDS, Tool, is_refused, model_of, run_folder

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
ESM = {"position_embedding_type": "rotary", "emb_layer_norm_before": False, "mask_token_id": 5}
FOREIGN: dict[str, PreTrainedModel] = {
    "llama": LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False)),
    "llama with biases": LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True)),
    "megatron bert": MegatronBertForMaskedLM(MegatronBertConfig(**SHAPE)),
    "esm": EsmForMaskedLM(EsmConfig(**SHAPE, **ESM, rope_theta=500.0)),
}


@pytest.fixture
def import_hf(tool: Tool) -> Tool:
    """Runs tools/import_hf.py."""
    return lambda *arguments: tool("import_hf.py", *arguments)


@pytest.mark.parametrize("tokenizer", ["bpe"], indirect=True)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_export_import_export_changes_no_bit(
    tmp_path: Path, tokenizer: Tokenizer, kind: str, tied: bool, precision: str, export: Tool, import_hf: Tool
) -> None:
    model = model_of(kind, tokenizer.vocab_size, tie_word_embeddings=tied)
    with lone_process_groups() as groups:
        run_folder(tmp_path / "run", groups, model, tokenizer)
    options = ("--precision", precision, "--tokenizer", tmp_path / "data" / "tokenizer.model")
    assert export(tmp_path / "run", tmp_path / "first", *options).code == 0
    done = import_hf(tmp_path / "first", tmp_path / "imported")
    assert done.code == 0, done.error
    assert load_trained_model(tmp_path / "imported").model == model
    assert json.loads(done.printed.split('"model": ')[1].split(", ...}")[0]) == model.model_dump(mode="json")
    assert export(tmp_path / "imported", tmp_path / "second", *options).code == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_models_compute_the_same_once_they_are_ours(tmp_path: Path, name: str, import_hf: Tool) -> None:
    theirs, tokens = FOREIGN[name].eval(), torch.arange(1, 25)[None]
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    done = import_hf(tmp_path / "theirs", tmp_path / "run", "--optimizer", "adam")  # as run files may spell it
    assert done.code == 0, done.error
    trained = load_trained_model(tmp_path / "run")
    back = to_hugging_face(trained.model, trained.weights)
    with torch.no_grad():
        assert (back(tokens).logits - theirs(tokens).logits).abs().max() < 1e-5  # token types are added elsewhere
    assert trained.step == 0
    assert trained.run_state[OPTIMIZER] == "Adam"
    assert RunState.from_dict(trained.run_state, 8) == RunState()


def test_an_optimizer_that_no_run_has_is_refused(tmp_path: Path, import_hf: Tool) -> None:
    done = import_hf(tmp_path / "theirs", tmp_path / "run", "--optimizer", "AdmW")
    assert (done.code, list(tmp_path.iterdir())) == (2, [])
    assert "--optimizer AdmW must be one of AdamW, Adam, Lion, SGD" in done.error
    assert done.error.rstrip().endswith("did you mean 'AdamW'?")


@pytest.mark.parametrize("tokenizer", ["bpe"], indirect=True)
def test_the_tokenizer_is_recorded_and_another_one_refused(
    tmp_path: Path, tokenizer: Tokenizer, export: Tool, import_hf: Tool
) -> None:
    with lone_process_groups() as groups:
        run_folder(tmp_path / "run", groups, model_of("ul2", tokenizer.vocab_size), tokenizer)
    assert export(tmp_path / "run", tmp_path / "exported").code == 0
    done = import_hf(tmp_path / "exported", tmp_path / "imported")
    assert f"tools/prepare_data.py --tokenizer {tmp_path / 'exported' / 'tokenizer.model'}" in done.printed
    trained = load_trained_model(tmp_path / "imported")
    here = Identity(tokenizer.digest, "a corpus", {"train_batch_size": 8})
    assert changes_since(trained.run_state, here, trained.folder).lines == []
    with pytest.raises(CheckpointError, match=f"another tokenizer .digest {tokenizer.digest}"):
        changes_since(trained.run_state, replace(here, tokenizer="0123"), trained.folder)
    spaces_stay = tokenizer.model + b"\x1a\x02\x28\x00"  # escape_whitespaces=false, which is not supported
    for name, model in {"foreign": b"of another project", "spaces": spaces_stay}.items():
        (tmp_path / "exported" / "tokenizer.model").write_bytes(model)
        done = import_hf(tmp_path / "exported", tmp_path / name)
        assert done.code == 0
        assert "none is recorded" in done.printed
        assert IDENTITY not in load_trained_model(tmp_path / name).run_state


def test_a_run_begins_from_an_import(tmp_path: Path, import_hf: Tool) -> None:
    FOREIGN["esm"].save_pretrained(tmp_path / "theirs")
    assert import_hf(tmp_path / "theirs", tmp_path / "imported").code == 0
    trained = load_trained_model(tmp_path / "imported")
    with lone_process_groups() as groups:
        engine = _engine(trained.model, groups)
        checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", groups, keep=1)
        restored = checkpoints.restore(engine, str(tmp_path / "imported"), trained.model)
        checkpoints.close()
    assert restored is not None
    assert restored.step == 0
    assert all(torch.equal(parameter, trained.weights[name]) for name, parameter in engine.parameters.items())


def _engine(model: Any, groups: ProcessGroups) -> ReferenceEngine:
    stage = build_stage(model, groups, range(model.num_layers), recompute=False, seed=9)
    return ReferenceEngine(stage, seed=1, skipped_update="freeze", max_norm=1.0)


@pytest.mark.parametrize(
    ("model", "word"),
    [
        (LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2)), "num_key_value_heads=2"),
        (EsmForMaskedLM(EsmConfig(**SHAPE, **ESM, token_dropout=True)), "token_dropout=True"),
        (MegatronBertForMaskedLM(MegatronBertConfig(**SHAPE, hidden_act="relu")), "hidden_act=relu"),
        (MegatronBertForMaskedLM(MegatronBertConfig(**SHAPE, layer_norm_eps=0.0)), "layer_norm_eps=0.0"),
        (FOREIGN["megatron bert"].bert, "MegatronBertModel"),
        (EsmForMaskedLM(EsmConfig(**SHAPE, **ESM)).to(torch.bfloat16), "inv_freq"),  # which rounds them
    ],
    ids=["grouped", "token-dropout", "relu", "no-epsilon", "no-head", "rounded"],
)
def test_what_ours_cannot_be_is_refused(tmp_path: Path, model: PreTrainedModel, word: str, import_hf: Tool) -> None:
    model.save_pretrained(tmp_path / "theirs")
    assert is_refused(import_hf(tmp_path / "theirs", tmp_path / "run"), word)
    assert not (tmp_path / "run").exists()


def test_folders_that_cannot_be_imported(tmp_path: Path, import_hf: Tool) -> None:
    theirs, run = tmp_path / "theirs", tmp_path / "run"
    assert is_refused(import_hf(theirs, run), "no such folder")
    theirs.mkdir()
    assert is_refused(import_hf(theirs, run), "no config.json of transformers")
    FOREIGN["llama"].save_pretrained(theirs)
    config = json.loads((theirs / "config.json").read_text())
    (theirs / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    assert is_refused(import_hf(theirs, run), "lacks 9 of the tensors", "model.layers.2.")
    (theirs / "config.json").write_text(json.dumps(config))
    whole = (theirs / "model.safetensors").read_bytes()
    (theirs / "model.safetensors").write_bytes(whole[:-5])
    assert is_refused(import_hf(theirs, run), theirs, "cannot be loaded")
    (theirs / "model.safetensors").write_bytes(whole)
    (tmp_path / "file").write_text("")
    assert is_refused(import_hf(theirs, tmp_path / "file"), tmp_path / "file")
    assert import_hf(theirs, run).code == 0
    assert is_refused(import_hf(theirs, run), "holds checkpoints already")
