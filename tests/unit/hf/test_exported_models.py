"""Exported folders where our code is not installed: the same logits, in any precision, and a card that is true."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from raptr_ds.data.batch import MicroBatch, Sample, collate
from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.hf.model import hugging_face_inputs
from raptr_ds.model.stage import Stage
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.paths import LayerPath
from tests.exported_runs import KINDS, Tool, is_refused, model_of, run_folder

pytestmark = pytest.mark.parametrize("tokenizer", ["bpe"], indirect=True)

ELSEWHERE = """
import sys
sys.modules["raptr_ds"] = None  # as where it is not installed
import json, re, torch, transformers
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
inputs = torch.load("inputs.pt")
results = {}
for folder in ("fp32", "bf16"):
    kind = json.load(open(f"{folder}/config.json"))["architectures"][0]
    loader = AutoModelForCausalLM if kind.endswith("CausalLM") else AutoModelForMaskedLM
    model, found = loader.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(found[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
    with torch.no_grad():
        results[folder] = model(**inputs).logits.log_softmax(-1)
torch.save(results, "results.pt")
import os
os.chdir("fp32")
exec(re.search("```python\\n(.*?)```", open("README.md").read(), re.DOTALL)[1])
"""


def batch_of(stage: Stage) -> MicroBatch:
    """Return sequences with and without padding, special tokens in them."""
    model, rng = stage.model, np.random.default_rng(0)
    samples = [
        Sample(
            tokens=rng.integers(1, model.vocab_size, length),  # masks too, which other kinds of ESM treat differently
            positions=np.arange(length),
            targets=np.zeros(length, np.int64),
            prefix_length=length if model.architecture == "bert" else 4,
        )
        for length in (model.seq_length, model.seq_length - 5, 3)
    ]
    return collate(samples, range(3), model.seq_length, pad_id=0)


def log_probabilities(stage: Stage, batch: MicroBatch, num_layers: int = 2) -> torch.Tensor:
    """Return (positions, vocabulary), asked for as the loss of every target at every position."""
    vocab_size = stage.model.vocab_size
    every = replace(
        batch,
        positions=batch.positions.repeat_interleave(vocab_size),
        targets=torch.arange(vocab_size).repeat(batch.num_predictions),
    )
    with torch.no_grad():
        return -stage(batch.tokens, every, LayerPath.full(num_layers), None).view(-1, vocab_size)


def in_bf16(stage: Stage) -> Stage:
    """Round the weights to what bf16 can hold."""
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.copy_(parameter.bfloat16().float())
    return stage


@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_are_ours_where_our_code_is_not(
    tmp_path: Path, groups: ProcessGroups, tokenizer: Tokenizer, kind: str, export: Tool
) -> None:
    model = model_of(kind, tokenizer.vocab_size, init_method_std=0.2)  # attention far from uniform
    stage = run_folder(tmp_path / "run", groups, model, tokenizer)
    for precision in ("fp32", "bf16"):
        done = export(tmp_path / "run", tmp_path / precision, "--precision", precision, "--max-shard-size", "50KB")
        assert done.code == 0, done.error
    batch = batch_of(stage)
    inputs = hugging_face_inputs(model, batch)
    torch.save({name: inputs[name] for name in ("input_ids", "attention_mask")}, tmp_path / "inputs.pt")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", ELSEWHERE]
    elsewhere = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, timeout=240, cwd=tmp_path, env=environment
    )
    assert elsewhere.stdout  # of the card's own lines
    results = torch.load(tmp_path / "results.pt")
    expected = {"fp32": log_probabilities(stage, batch)}
    expected["bf16"] = log_probabilities(in_bf16(stage), batch)
    for precision, ours in expected.items():
        theirs = results[precision].flatten(0, 1)[batch.positions]
        assert (theirs - ours).abs().max() < 1e-5  # fp32, another order of sums
        assert ours.std() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_shards(
    tmp_path: Path, groups: ProcessGroups, tokenizer: Tokenizer, kind: str, export: Tool
) -> None:
    model = model_of(kind, tokenizer.vocab_size)
    run_folder(tmp_path / "run", groups, model, tokenizer)
    assert export(tmp_path / "run", tmp_path / "one").code == 0
    assert export(tmp_path / "run", tmp_path / "many", "--max-shard-size", "50KB").code == 0
    whole = load_file(tmp_path / "one" / "model.safetensors")
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    shards = [load_file(file) for file in files]
    assert len(shards) > 2
    assert all(len(shard) == 1 or sum(t.nbytes for t in shard.values()) <= 50_000 for shard in shards)
    assert len({file.stat().st_mode for file in (tmp_path / "many").iterdir()}) == 1  # others may read all of it
    together = {name: tensor for shard in shards for name, tensor in shard.items()}
    assert together.keys() == whole.keys()
    assert all(torch.equal(together[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("size", ["", "5", "GB", "-1GB", "0GB", "0.0MB", "5XB", "1e3GB", "five GB"])
def test_sizes_of_shards_that_are_none(tmp_path: Path, tokenizer: Tokenizer, size: str, export: Tool) -> None:
    assert is_refused(export(tmp_path / "run", tmp_path / "out", f"--max-shard-size={size}"), repr(size), "5GB")
    assert not (tmp_path / "out").exists()


def card_rows(text: str) -> dict[str, str]:
    return dict(re.findall(r"^\| (.+?) \| (.+) \|$", text, re.MULTILINE))


def test_the_card_has_the_numbers_of_the_run(
    tmp_path: Path, groups: ProcessGroups, tokenizer: Tokenizer, export: Tool
) -> None:
    run = tmp_path / "run"
    path = {"method": "raptr", "schedule": [1, 2], "split": "uniform", "fixed_layers": []}
    config = {"raptr_ds": {"train": {"steps": 1000}, "path": path}}
    recorded = {
        "identity": {"tokenizer": tokenizer.digest, "config": config},
        **{"tokens": 123_456, "flops": 3e9, "full_flops": 4e9},
    }
    stage = run_folder(run, groups, model_of("rotary bert", tokenizer.vocab_size), tokenizer, recorded)
    lines = [
        {"step": 2, "eval_loss": 5.5, "path_length": 2},
        {"step": 3, "eval_loss": 4.25, "path_length": 2},
        {"step": 3, "eval_loss": 1.0, "path_length": 1},  # of another depth
        {"step": 4, "eval_loss": 0.5, "path_length": 2},  # after the checkpoint
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert export(run, tmp_path / "out", "--precision", "bf16").code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    rows = card_rows(card)
    assert rows["class in transformers"] == "`EsmForMaskedLM`"
    assert rows["parameters"] == f"{sum(p.numel() for p in stage.parameters()):,}"
    assert rows["precision of the weights"] == "bf16"
    assert rows["steps"] == "3 of 1,000"
    assert rows["tokens"] == "123,456"
    assert rows["FLOPs"] == "3e+09, 25.0% less than the full model on the same batches"
    assert rows["held-out loss"] == "4.2500 nats per predicted token, after step 3"
    assert rows["path method"] == "raptr; schedule [1, 2]; split uniform"
    assert rows["tokenizer"] == f"sentencepiece bpe of {tokenizer.vocab_size:,} pieces, digest {tokenizer.digest}"
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: fill-mask\n")


@pytest.mark.parametrize(
    "metrics", [None, b"", b"not json\n{}\n", b'{"step": 3, "eval_loss": null, "path_length": 2}\n'], ids=range(4)
)
def test_the_card_leaves_out_what_is_not_known(
    tmp_path: Path, groups: ProcessGroups, tokenizer: Tokenizer, metrics: bytes | None, export: Tool
) -> None:
    run_folder(tmp_path / "run", groups, model_of("bert", tokenizer.vocab_size), tokenizer)
    if metrics is not None:
        (tmp_path / "run" / "metrics.jsonl").write_bytes(metrics)
    assert export(tmp_path / "run", tmp_path / "out", "--tokenizer", "none").code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    rows = card_rows(card)
    assert rows["steps"] == "3"
    assert not rows.keys() & {"tokens", "FLOPs", "held-out loss", "path method"}
    assert rows["tokenizer"] == "not in this folder"
    assert "pipeline(" not in card


@pytest.mark.parametrize("name", ["config.json", "README.md"])
def test_nothing_of_the_users_is_overwritten(
    tmp_path: Path, groups: ProcessGroups, tokenizer: Tokenizer, name: str, export: Tool
) -> None:
    run_folder(tmp_path / "run", groups, model_of("bert", tokenizer.vocab_size), tokenizer)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    assert is_refused(export(tmp_path / "run", tmp_path / "out"), tmp_path / "out", name)
    assert (tmp_path / "out" / name).read_text() == "mine"
    assert len(list((tmp_path / "out").iterdir())) == 1
