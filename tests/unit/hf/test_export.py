"""From a checkpoint to a transformers folder, through the tool itself: the model and the tokenizer that come back."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, pipeline

from raptr_ds.checkpoint.weights import load_trained_model
from raptr_ds.config.sections import ModelSection
from raptr_ds.data.batch import MicroBatch, Sample, collate
from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.hf.export import _system_error
from raptr_ds.hf.model import hugging_face_inputs
from raptr_ds.hf.tokenizer import SAMPLE_TEXTS, check_same_ids
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.paths import LayerPath
from raptr_ds.prepare.index_writer import write_index
from tests.exported_runs import KINDS, Tool, is_refused, model_of, run_folder
from tests.foreign_models import UNUSUAL
from tests.full_disk import largest_file

ROOT = Path(__file__).parents[3]
ONLY_BPE = pytest.mark.parametrize("tokenizer", ["bpe"], indirect=True)


def a_batch(model: ModelSection) -> MicroBatch:
    rng = np.random.default_rng(0)
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


@pytest.mark.parametrize("tokenizer", ["bpe", "t5", "llama"], indirect=True)
@pytest.mark.parametrize("kind", KINDS)
def test_the_exported_folder_is_the_trained_model(
    tmp_path: Path, groups: ProcessGroups, tokenizer: Tokenizer, kind: str, export: Tool
) -> None:
    model = model_of(kind, tokenizer.vocab_size)
    stage = run_folder(tmp_path / "run", groups, model, tokenizer)
    done = export(tmp_path / "run", tmp_path / "out")
    assert done.code == 0, done.error
    assert "step 3" in done.printed
    loader = AutoModelForMaskedLM if kind != "ul2" else AutoModelForCausalLM
    theirs = loader.from_pretrained(tmp_path / "out").eval()
    batch = a_batch(model)
    with torch.no_grad():
        their_loss = theirs(**hugging_face_inputs(model, batch)).loss
        our_loss = stage(batch.tokens, batch, LayerPath.full(2), None).mean()
    assert abs(their_loss - our_loss) < 1e-5  # fp32, another order of sums
    special_ids = {"pad_token_id": tokenizer.pad_id, "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    files = ["config.json"] if kind != "ul2" else ["config.json", "generation_config.json"]
    for file in files:
        written = json.loads((tmp_path / "out" / file).read_text())
        assert {key: written.get(key) for key in special_ids} == special_ids

    reloaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    ends = [tokenizer.cls_id], [tokenizer.sep_id]
    around = ends if kind != "ul2" else ([], [])
    assert reloaded("the model")["input_ids"] == [*around[0], *tokenizer.encode("the model").tolist(), *around[1]]
    assert reloaded.mask_token_id == tokenizer.mask_id
    check_same_ids(tokenizer, reloaded, [*SAMPLE_TEXTS, *UNUSUAL])
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == tokenizer.model

    again = export(tmp_path / "run", tmp_path / "out")
    assert again.code == 2
    assert "already" in again.error


@ONLY_BPE
def test_weights_come_back_bit_by_bit(tmp_path: Path, groups: ProcessGroups, tokenizer: Tokenizer) -> None:
    model = model_of("ul2", tokenizer.vocab_size)
    stage = run_folder(tmp_path / "run", groups, model, tokenizer)
    trained = load_trained_model(tmp_path / "run")
    assert (trained.model, trained.step) == (model, 3)
    weights = dict(stage.named_parameters())
    assert trained.weights.keys() == weights.keys()
    assert all(torch.equal(trained.weights[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("kind", ["bert", "rotary bert"])
def test_fill_mask_predicts_what_our_model_does(
    tmp_path: Path, groups: ProcessGroups, tokenizer: Tokenizer, kind: str, export: Tool
) -> None:
    model = model_of(kind, tokenizer.vocab_size)
    stage = run_folder(tmp_path / "run", groups, model, tokenizer)
    assert export(tmp_path / "run", tmp_path / "out").code == 0
    answers = pipeline("fill-mask", model=str(tmp_path / "out"))("The value [MASK] a name.", top_k=10)

    before, after = tokenizer.encode("The value"), tokenizer.encode("a name.")
    tokens = np.array([tokenizer.cls_id, *before, tokenizer.mask_id, *after, tokenizer.sep_id])
    every_token = np.arange(tokenizer.vocab_size)
    masked = np.full(tokenizer.vocab_size, 1 + len(before))
    batch = collate([Sample(tokens, masked, every_token, len(tokens))], [0], model.seq_length, tokenizer.pad_id)
    with torch.no_grad():
        probabilities = torch.exp(-stage(batch.tokens, batch, LayerPath.full(2), None))
    assert abs(probabilities.sum() - 1) < 1e-4
    assert [answer["token"] for answer in answers] == probabilities.argsort(descending=True)[:10].tolist()
    for answer in answers:
        assert abs(answer["score"] - probabilities[answer["token"]]) < 1e-6  # fp32, another order of sums
        word = tokenizer.decode([*before, answer["token"], *after])
        assert answer["sequence"] == word


class AlwaysEnds(torch.nn.Module):
    """A head that predicts one token."""

    def __init__(self, vocab_size: int, token: int) -> None:
        super().__init__()
        self.logits = torch.nn.functional.one_hot(torch.tensor(token), vocab_size).float()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(*hidden.shape[:-1], -1)


@ONLY_BPE
def test_generation_stops_at_the_end_of_a_text(
    tmp_path: Path, groups: ProcessGroups, tokenizer: Tokenizer, export: Tool
) -> None:
    run_folder(tmp_path / "run", groups, model_of("ul2", tokenizer.vocab_size), tokenizer)
    assert export(tmp_path / "run", tmp_path / "out").code == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    reloaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompts = ["[S2S] the name of", "a"]
    batch = theirs.generate(**reloaded(prompts, padding=True, return_tensors="pt"), max_new_tokens=6)
    for prompt, row in zip(prompts, batch.tolist(), strict=True):
        one = theirs.generate(**reloaded(prompt, return_tensors="pt"), max_new_tokens=6)[0].tolist()
        padding = len(row) - len(one)
        assert row == [tokenizer.pad_id] * padding + one
    theirs.lm_head = AlwaysEnds(tokenizer.vocab_size, tokenizer.eos_id)
    prompt = reloaded("the name", return_tensors="pt")
    generated = theirs.generate(**prompt, max_new_tokens=20)[0].tolist()
    assert generated == [*prompt["input_ids"][0].tolist(), tokenizer.eos_id]


@pytest.fixture
def run(tmp_path: Path, groups: ProcessGroups, tokenizer: Tokenizer) -> Path:
    folder = tmp_path / "run"
    run_folder(folder, groups, model_of("bert", tokenizer.vocab_size), tokenizer)
    return folder


@ONLY_BPE
def test_another_size_of_vocabulary_is_refused(
    tmp_path: Path, groups: ProcessGroups, tokenizer: Tokenizer, export: Tool
) -> None:
    run_folder(tmp_path / "run", groups, model_of("bert", 650), tokenizer)
    assert is_refused(export(tmp_path / "run", tmp_path / "out"), "700 entries, the model 650")


@ONLY_BPE
def test_another_tokenizer_of_the_same_size_is_refused(run: Path, tokenizer: Tokenizer, export: Tool) -> None:
    other = run.parent / "other.model"
    other.write_bytes(tokenizer.model + b"\x12\x00")  # an empty trainer specification, which changes nothing else
    assert is_refused(export(run, run.parent / "out", "--tokenizer", other), other, Tokenizer.load(other).digest)
    other.rename(run.parent / "data" / "tokenizer.model")  # the data prepared again with another one
    assert is_refused(export(run, run.parent / "out"), "not the one that the model was trained with", tokenizer.digest)
    assert export(run, run.parent / "out", "--tokenizer", "none").code == 0


@ONLY_BPE
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"raptr_ds": {"data": {"pa',
        b"{}",
        b"[]",
        b"null",
        b'{"raptr_ds": null}',
        b'{"raptr_ds": {"data": {}}}',
        b'{"raptr_ds": {"data": []}}',
        b'{"raptr_ds": {"data": {"path": null}}}',
        b'{"raptr_ds": {"data": {"path": {}}}}',
        b'{"raptr_ds": {"data": {"path": ["a", "b"]}}}',
        b'{"raptr_ds": {"data": {"path": "a", "tokenizer": 5}}}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
    ids=range(14),
)
def test_a_damaged_configuration_is_refused(run: Path, export: Tool, content: bytes) -> None:
    (run / "config.json").write_bytes(content)
    assert is_refused(export(run, run.parent / "out"), run / "config.json", "damaged", "--tokenizer FILE")
    assert not (run.parent / "out").exists()


@ONLY_BPE
def test_a_run_without_its_configuration_needs_the_tokenizer_named(run: Path, export: Tool) -> None:
    (run / "config.json").unlink()
    assert export(run, run.parent / "out", "--tokenizer", run.parent / "data" / "tokenizer.model").code == 0
    assert (run.parent / "out" / "tokenizer.json").exists()


@ONLY_BPE
def test_incomplete_runs_are_refused(run: Path, export: Tool) -> None:
    out = run.parent / "out"
    step = run / "checkpoints" / "step-00000003"
    assert is_refused(export(run.parent / "nothing", out), "no such folder")
    assert is_refused(export(run.parent / "data", out), "no checkpoint in it")

    tokenizer = run.parent / "data" / "tokenizer.model"
    tokenizer.rename(tokenizer.with_name("elsewhere"))
    assert is_refused(export(run, out), tokenizer, "config.json", "--tokenizer FILE", "--tokenizer none")
    tokenizer.write_bytes(b"no model")
    assert is_refused(export(run, out), tokenizer, "not a sentencepiece model")

    tensors = step / "rank-00000.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-1])
    assert is_refused(export(run, out), step, "rank-00000.safetensors has")
    tensors.unlink()
    assert is_refused(export(run, out), step, "rank-00000.safetensors: No such file")
    tensors.write_bytes(whole)
    manifest = step / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:40])
    assert is_refused(export(run, out), step, "manifest.json is not a manifest")
    manifest.unlink()
    assert is_refused(export(step, out), step, "cannot read manifest.json")
    assert not out.exists()


@ONLY_BPE
def test_what_may_not_be_read_is_refused(run: Path, export: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's refusal is made here: tests may run as root, who may read everything."""
    out = run.parent / "out"

    def refuse(method: str, refused: Path) -> None:
        allowed = getattr(Path, method)

        def read(path: Path, *arguments: object, **options: object) -> object:
            if path == refused:
                raise PermissionError(13, "Permission denied", str(path))
            return allowed(path, *arguments, **options)

        monkeypatch.setattr(Path, method, read)

    refuse("read_bytes", run.parent / "data" / "tokenizer.model")
    assert is_refused(export(run, out), "tokenizer.model: Permission denied")
    refuse("read_text", run / "config.json")
    assert is_refused(export(run, out), f"cannot read {run / 'config.json'}: Permission denied")
    refuse("iterdir", run / "checkpoints")
    assert is_refused(export(run, out), f"{run / 'checkpoints'} cannot be used: Permission denied")
    monkeypatch.undo()


@ONLY_BPE
def test_an_output_that_cannot_be_written_is_refused(run: Path, export: Tool) -> None:
    (run.parent / "file").write_text("")
    assert is_refused(export(run, run.parent / "file"), "cannot be written")
    assert is_refused(export(run, run.parent / "file" / "out"), "cannot be written")


@ONLY_BPE
def test_an_export_that_the_disk_refuses_can_be_made_again(run: Path, export: Tool) -> None:
    out = run.parent / "out"
    assert export(run, run.parent / "other").code == 0
    expected = {file.name: file.read_bytes() for file in (run.parent / "other").iterdir()}
    with largest_file(len(expected["model.safetensors"]) - 1):
        assert is_refused(export(run, out), "cannot be written: File too large")
    assert list(out.iterdir()) == []
    (out / ".unfinished").mkdir()
    (out / ".unfinished" / "config.json").write_text("of an export that was killed")
    assert export(run, out).code == 0
    assert {file.name: file.read_bytes() for file in out.iterdir()} == expected


def test_what_the_disk_refuses_is_known_by_the_text_of_safetensors(tmp_path: Path) -> None:
    with largest_file(10_000), pytest.raises(SafetensorError) as caught:
        save_file({"weights": torch.zeros(100_000)}, tmp_path / "weights.safetensors")
    assert _system_error(caught.value).errno == errno.EFBIG
    assert _system_error(SafetensorError("a header that is too long")).errno is None


@ONLY_BPE
def test_weights_without_a_tokenizer(run: Path, export: Tool) -> None:
    """Asked for, or where a checkpoint lies outside of its run."""
    asked = export(run, run.parent / "out", "--tokenizer", "none")
    assert asked.code == 0
    copied = (run / "checkpoints" / "step-00000003").rename(run.parent / "step-00000003")
    alone = export(copied, run.parent / "out2")
    assert alone.code == 0
    for done, name in ((asked, "out"), (alone, "out2")):
        assert "without a tokenizer" in done.printed
        assert not (run.parent / name / "tokenizer.json").exists()
        assert AutoModelForMaskedLM.from_pretrained(run.parent / name).config.eos_token_id is None


@ONLY_BPE
def test_validation_documents_are_compared(
    run: Path, export: Tool, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [np.append(tokenizer.encode(text), tokenizer.eos_id) for text in ("one document", "two\nlines")]
    data = run.parent / "data"
    write_index(data / "validation.idx", np.array([len(document) for document in documents]), np.dtype(np.uint16))
    (data / "validation.bin").write_bytes(np.concatenate(documents).astype(np.uint16).tobytes())
    encoded = []

    def encode(self: Tokenizer, text: str) -> np.ndarray:
        encoded.append(text)
        return original(self, text)[: None if text != "two\nlines" else -1]

    original = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", encode)
    assert is_refused(export(run, run.parent / "out"), "'two\\nlines' has", "encode differently")
    assert "one document" in encoded
    assert not (run.parent / "out").exists()
