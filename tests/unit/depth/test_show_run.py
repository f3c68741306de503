"""tools/show_run.py: what it prints, that guesses are the model's own, and that it does without transformers."""

import math
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from raptr_ds.config.sections import Denoiser
from raptr_ds.data.batch import Sample, collate
from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.depth.guesses import Blank, continued_sentence, infilled_sentence, masked_sentence
from raptr_ds.depth.held_out import read_held_out
from raptr_ds.depth.network import Network
from raptr_ds.depth.sentences import held_out_sentences, token_texts, words_of
from raptr_ds.depth.showing import hidden_words
from raptr_ds.model.stage import Stage
from raptr_ds.paths import LayerPath
from raptr_ds.prepare.index_writer import token_dtype, write_index
from tests.depth_runs import MakeRun
from tests.exported_runs import KINDS, Tool

ROOT = Path(__file__).parents[3]
PATH = LayerPath((0, 2, 4), 5)
WITHOUT_TRANSFORMERS = """
import runpy, sys
sys.modules["transformers"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def log_probabilities(stage: Stage, tokens: list[int], at: int, prefix: int) -> torch.Tensor:
    """Return those of every token at one place, by the losses of our model alone."""
    every = np.arange(stage.model.vocab_size)
    batch = collate([Sample(np.array(tokens), np.full(len(every), at), every, prefix)], [0], len(tokens), 0)
    with torch.no_grad():
        return -stage(batch.tokens, batch, PATH, None)


def write_document(folder: Path, tokenizer: Tokenizer, text: str) -> None:
    """Write a validation split of one document."""
    tokens = np.array([*tokenizer.encode(text), tokenizer.eos_id], token_dtype(tokenizer.vocab_size))
    (folder / "validation.bin").write_bytes(tokens.tobytes())
    write_index(folder / "validation.idx", np.array([len(tokens)]), tokens.dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_prints(make_run: MakeRun, tool: Tool, kind: str) -> None:
    source, _ = make_run(kind, "shown")
    done = tool("show_run.py", source.folder, "--sequences", 4, "--tokenizer", source.tokenizer.origin)
    assert done.code == 0, done.error
    assert "What shown fills in" in done.printed
    assert done.printed.count("%)") >= 5
    for line in ("all 5 layers", "3/4 4 layers", "half 3 layers"):
        assert line in done.printed
    again = tool("show_run.py", source.folder, "--sequences", 4)
    assert again.printed == done.printed
    assert tool("show_run.py", source.folder, "--sequences", 4, "--seed", 7).printed != done.printed


@pytest.mark.parametrize("name", ["show_run.py", "depth.py"])
def test_a_run_without_a_checkpoint_is_named_as_such(tool: Tool, tmp_path: Path, name: str) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    done = tool(name, tmp_path)
    assert (done.code, done.printed) == (2, "")
    assert f"{tmp_path}: there is no checkpoint in it. Name a run that has saved one" in done.error
    assert "raptr_ds.checkpoint.load" not in done.error


def test_it_needs_no_transformers(make_run: MakeRun) -> None:
    source, _ = make_run("ul2")
    command = [sys.executable, "-c", WITHOUT_TRANSFORMERS, str(ROOT / "tools" / "show_run.py"), str(source.folder)]
    done = subprocess.run(
        [*command, "--sequences", "2"], capture_output=True, text=True, timeout=120, check=False, cwd=ROOT / "tools"
    )
    assert done.returncode == 0, done.stderr
    assert "half 3 layers" in done.stdout


def test_one_document_and_any_alphabet_give_as_many_sentences_as_asked_for(make_run: MakeRun, tmp_path: Path) -> None:
    source, _ = make_run("bert")
    tokenizer = source.tokenizer
    english = "The value of a name is the name of a value here."
    russian = " ".join(["\u0438\u043c\u044f"] * 8).capitalize() + "."
    arabic = " ".join(["\u0627\u0633\u0645"] * 8) + "."
    prose = f"not a sentence because it begins with no capital. {english} {russian}\n\n{arabic}"
    write_document(tmp_path, tokenizer, prose)
    held_out = replace(read_held_out(source), folders={str(tmp_path): 1.0})
    found = held_out_sentences(held_out, tokenizer, 3, 200)
    assert {tokenizer.decode(tokens) for tokens in found} == {english, russian, arabic}
    write_document(tmp_path, tokenizer, "x = [1]\n" * 200)
    assert len(held_out_sentences(held_out, tokenizer, 5, 20)) == 5


def test_masked_words_have_the_models_probabilities(make_run: MakeRun) -> None:
    source, stage = make_run("bert")
    tokenizer, network = source.tokenizer, Network(stage, torch.device("cpu"))
    text = held_out_sentences(read_held_out(source), tokenizer, 1, 20)[0]
    filled = masked_sentence(network, PATH, tokenizer, text, [1, 3], number=4)
    tokens = [tokenizer.cls_id, *text.tolist(), tokenizer.sep_id]
    tokens[2] = tokens[4] = tokenizer.mask_id
    blanks = [part for part in filled.parts if isinstance(part, Blank)]
    known = [token for part in filled.parts if not isinstance(part, Blank) for token in part]
    assert known == np.delete(text, [1, 3]).tolist()
    for blank, at in zip(blanks, (2, 4), strict=True):
        wanted = log_probabilities(stage, tokens, at, len(tokens)).exp()
        values, ids = wanted.topk(4)
        assert [guess.tokens for guess in blank.guesses] == [(token,) for token in ids.tolist()]
        assert [guess.probability for guess in blank.guesses] == pytest.approx(values.tolist(), rel=1e-4)
        assert blank.right is not None
        assert blank.right.tokens == (text[at - 1],)
        assert blank.right.probability == pytest.approx(float(wanted[text[at - 1]]), rel=1e-4)


@pytest.mark.parametrize("kind", ["span", "prefix", "causal"])
def test_ul2_fills_in_the_likeliest_tokens(make_run: MakeRun, kind: str) -> None:
    source, stage = make_run("ul2")
    tokenizer, network = source.tokenizer, Network(stage, torch.device("cpu"))
    text = held_out_sentences(read_held_out(source), tokenizer, 1, 9)[0][:9]
    if kind == "span":
        denoiser = Denoiser(name="one", kind="span", mean_span=3, rate=0.15, mode="[NLU]")
        filled = infilled_sentence(network, PATH, tokenizer, text, [range(2, 4)], denoiser)
        first = int(tokenizer.sentinel_ids[0])
        prompt = [tokenizer.mode_ids["[NLU]"], *text[:2].tolist(), first, *text[4:].tolist()]
        prefix, begun = len(prompt), [first]
        ends = {tokenizer.eos_id, *tokenizer.sentinel_ids.tolist()}
    else:
        denoiser = Denoiser(name="one", kind=kind, rate=0.25 if kind == "prefix" else None, mode="[S2S]")  # type: ignore[arg-type]
        filled = continued_sentence(network, PATH, tokenizer, text, 4, denoiser)
        prompt = [tokenizer.mode_ids["[S2S]"], *text[:4].tolist()]
        prefix, begun, ends = len(prompt) if kind == "prefix" else 1, [], {tokenizer.eos_id}
    (blank,) = (part for part in filled.parts if isinstance(part, Blank))
    tokens, logs = [*prompt, *begun], []
    for token in (*blank.guesses[0].tokens, None):
        every = log_probabilities(stage, tokens, len(tokens) - 1, prefix)
        allowed = every.index_fill(0, torch.tensor(sorted(ends)), -torch.inf) if not logs else every
        best = int(allowed.argmax())
        if token is None and best not in ends:
            break  # it had no more room
        logs.append(float(every[best]))
        assert best in ends if token is None else best == token
        tokens.append(best)
    assert blank.guesses[0].probability == pytest.approx(math.exp(sum(logs) / len(logs)), rel=1e-4)


def test_words_and_texts_of_tokens(tokenizer: Tokenizer) -> None:
    text = "a caf\u00e9 \U0001f600 of names, here\nand (there)."
    tokens = tokenizer.encode(text)
    texts = token_texts(tokenizer, tokens)
    assert "".join(texts) == tokenizer.decode(tokens)
    words = ["".join(texts[word.start : word.stop]).strip() for word in words_of(tokenizer, tokens)]
    assert [word for word in words if word.isalnum()][-2:] == ["and", "there"]
    assert "names" in words
    assert not any("," in word and len(word) > 1 for word in words)


def test_hidden_words_do_not_touch(make_run: MakeRun) -> None:
    source, _ = make_run("bert")
    for text in held_out_sentences(read_held_out(source), source.tokenizer, 5, 40):
        hidden = hidden_words(source, text, seed=0)
        assert len(hidden) >= 2
        assert all(one.stop < other.start for one, other in pairwise(hidden))
