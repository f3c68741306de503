"""From a checkpoint to a transformers folder, through the tool itself: the model and the tokenizer that come back."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from raptr_ds.checkpoint.manager import Checkpoints
from raptr_ds.checkpoint.weights import load_trained_model
from raptr_ds.config.sections import ModelSection
from raptr_ds.data.batch import MicroBatch, Sample, collate
from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.engine.reference import ReferenceEngine
from raptr_ds.hf.model import hugging_face_inputs
from raptr_ds.hf.tokenizer import tokenizer_to_hugging_face
from raptr_ds.model.stage import Stage, build_stage
from raptr_ds.parallel.groups import ProcessGroups, make_process_groups
from raptr_ds.parallel.topology import Topology
from raptr_ds.paths import LayerPath
from raptr_ds.prepare.corpus import FileSource
from raptr_ds.prepare.readers import ReadingOptions
from raptr_ds.prepare.tokenizer_training import TokenizerSettings, train_tokenizer

ROOT = Path(__file__).parents[3]
TEXTS = [
    "the cat sat on the mat",
    "  two spaces before,  two between and two after  ",
    "first line\nsecond line\n\nafter an empty one\n",
    "\n\nempty lines first",
    "\tindented\n    four spaces\n",
    "unseen: \u4f60\u597d \U0001f600 \u00e9\u00e8",
    "digits 1234567890 and (punctuation) [brackets] <angles>",
    "",
]


@pytest.fixture(scope="module")
def groups() -> Iterator[ProcessGroups]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield make_process_groups(Topology(1, 1, 1), 0, torch.device("cpu"))
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def help_topics() -> list[str]:
    """Return English prose that every Python has: the same for one version of Python."""
    return [topics[name] for name in sorted(topics)]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer of the text of Python's help topics."""
    corpus = tmp_path_factory.mktemp("text") / "text.txt"
    corpus.write_text("\n".join(help_topics()[:30]))
    settings = TokenizerSettings(vocab_size=700, num_sentinels=8, model_type=request.param)
    return train_tokenizer([FileSource(corpus, ReadingOptions())], settings)


def model_of(architecture: str, vocab_size: int) -> ModelSection:
    shape = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "seq_length": 24}
    return ModelSection(architecture=architecture, vocab_size=vocab_size, **shape)  # type: ignore[arg-type]


def run_folder(folder: Path, groups: ProcessGroups, model: ModelSection, tokenizer: Tokenizer) -> Stage:
    """Write a run with one checkpoint and return the model in it."""
    stage = build_stage(model, groups, range(2), recompute=False, seed=1)
    data = folder.parent / "data"
    data.mkdir()
    tokenizer.save(data / "tokenizer.model")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"raptr_ds": {"data": {"path": str(data)}}}))
    checkpoints = Checkpoints(folder / "checkpoints", groups, keep=2)
    checkpoints.save(ReferenceEngine(stage, seed=1, skipped_update="freeze", max_norm=1.0), 3, model, {})
    checkpoints.wait()
    checkpoints.close()
    return stage


def export(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "export_hf.py"), *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment)


def a_batch(model: ModelSection) -> MicroBatch:
    rng = np.random.default_rng(0)
    assert model.vocab_size is not None
    samples = [
        Sample(
            tokens=rng.integers(10, model.vocab_size, length),
            positions=np.array([2, 5, length - 1]),
            targets=rng.integers(10, model.vocab_size, 3),
            prefix_length=length if model.architecture == "bert" else 4,
        )
        for length in (model.seq_length, model.seq_length - 5)
    ]
    return collate(samples, [0, 1], model.seq_length, pad_id=0)


@pytest.mark.parametrize("tokenizer", ["bpe"], indirect=True)
@pytest.mark.parametrize("architecture", ["bert", "ul2"])
def test_the_exported_folder_is_the_trained_model(
    tmp_path: Path, groups: ProcessGroups, tokenizer: Tokenizer, architecture: str
) -> None:
    model = model_of(architecture, tokenizer.vocab_size)
    stage = run_folder(tmp_path / "run", groups, model, tokenizer)
    done = export(tmp_path / "run", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "step 3" in done.stdout
    loader = AutoModelForMaskedLM if architecture == "bert" else AutoModelForCausalLM
    theirs = loader.from_pretrained(tmp_path / "out").eval()
    batch = a_batch(model)
    with torch.no_grad():
        their_loss = theirs(**hugging_face_inputs(model, batch)).loss
        our_loss = stage(batch.tokens, batch, LayerPath.full(2), None).mean()
    assert abs(their_loss - our_loss) < 1e-5  # fp32, another order of sums
    assert (theirs.config.pad_token_id, theirs.config.eos_token_id) == (tokenizer.pad_id, tokenizer.eos_id)

    reloaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    ends = [tokenizer.cls_id], [tokenizer.sep_id]
    around = ends if architecture == "bert" else ([], [])
    assert reloaded("the model")["input_ids"] == [*around[0], *tokenizer.encode("the model").tolist(), *around[1]]
    assert reloaded.mask_token_id == tokenizer.mask_id
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == tokenizer.model

    again = export(tmp_path / "run", tmp_path / "out")
    assert again.returncode == 2
    assert "already" in again.stderr


@pytest.mark.parametrize("tokenizer", ["bpe"], indirect=True)
def test_weights_come_back_bit_by_bit(tmp_path: Path, groups: ProcessGroups, tokenizer: Tokenizer) -> None:
    model = model_of("ul2", tokenizer.vocab_size)
    stage = run_folder(tmp_path / "run", groups, model, tokenizer)
    trained = load_trained_model(tmp_path / "run")
    assert (trained.model, trained.step) == (model, 3)
    weights = dict(stage.named_parameters())
    assert trained.weights.keys() == weights.keys()
    assert all(torch.equal(trained.weights[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("tokenizer", ["bpe"], indirect=True)
def test_errors_of_the_export(tmp_path: Path, groups: ProcessGroups, tokenizer: Tokenizer) -> None:
    missing = export(tmp_path / "nothing", tmp_path / "out")
    assert missing.returncode == 2
    assert "no such folder" in missing.stderr
    run_folder(tmp_path / "run", groups, model_of("bert", 650), tokenizer)
    other = export(tmp_path / "run", tmp_path / "out")
    assert other.returncode == 2
    assert "700 entries, the model 650" in other.stderr


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_transformers_gives_the_same_ids_and_text(tokenizer: Tokenizer, text: str) -> None:
    theirs = tokenizer_to_hugging_face(tokenizer, "ul2", 24)
    ids = theirs(text)["input_ids"]
    assert ids == tokenizer.encode(text).tolist()
    assert theirs.decode(ids) == text


def test_transformers_gives_the_same_ids_for_much_text(tokenizer: Tokenizer) -> None:
    """Line by line; a unigram model may have two segmentations of the same score, of which each library takes one."""
    theirs = tokenizer_to_hugging_face(tokenizer, "ul2", 24)
    lines = [line for topic in help_topics()[30:60] for line in topic.splitlines() if line.strip()]
    assert len(lines) > 500
    differing = 0
    for line in lines:
        ids = theirs(line)["input_ids"]
        assert theirs.decode(ids) == line
        differing += ids != tokenizer.encode(line).tolist()
    assert differing <= 0.01 * len(lines)
