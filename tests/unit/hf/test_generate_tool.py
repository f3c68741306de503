"""tools/generate.py: text from exported folders, runs and checkpoints, missing words filled in, and bad input."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.errors import ConfigError
from raptr_ds.hf.generation import GREEDY, Prompt, Sampling, generate
from raptr_ds.hf.load import load_prefix_model
from raptr_ds.hf.text import TextStream, filled, infilling_prompt, mode_ids, prompt_tokens, sentinel_ids
from raptr_ds.hf.tokenizer import tokenizer_to_hugging_face
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.prepare.tokenizer_training import TokenizerSettings, train_tokenizer
from tests.exported_runs import Done, Tool, is_refused, model_of, run_folder
from tests.made_up_text import TextSource

ONLY_BPE = pytest.mark.parametrize("tokenizer", ["bpe"], indirect=True)
PROMPT = "The value of the"
HOLES = "The <extra_id_0> of the\n<extra_id_1> is a name."


@pytest.fixture
def run(tmp_path: Path, groups: ProcessGroups, tokenizer: Tokenizer) -> Path:
    """A run of a small UL2 model."""
    model = model_of("ul2", tokenizer.vocab_size, seq_length=48, init_method_std=0.3)
    run_folder(tmp_path / "run", groups, model, tokenizer)
    return tmp_path / "run"


@pytest.fixture
def exported(run: Path, export: Tool) -> Path:
    assert export(run, run.parent / "exported").code == 0
    return run.parent / "exported"


@ONLY_BPE
@pytest.mark.parametrize("options", [(), ("--temperature", 0.9, "--top-p", 0.8, "--top-k", 50, "--seed", 3)], ids=len)
def test_every_kind_of_folder_gives_the_same_text(
    run: Path, exported: Path, tokenizer: Tokenizer, options: tuple[object, ...], tool: Tool
) -> None:
    step = run / "checkpoints" / "step-00000003"
    done = [tool("generate.py", at, PROMPT, "--max-new-tokens", 20, *options) for at in (run, step, exported)]
    assert {one.code for one in done} == {0}, done
    assert len({one.printed for one in done}) == 1
    loaded = load_prefix_model(exported)
    tokens = [tokenizer.mode_ids["[S2S]"], *tokenizer.encode(PROMPT).tolist()]
    sampling = Sampling(0.9, 50, 0.8, 3) if options else GREEDY
    (continuation,) = generate(loaded.model, [Prompt(tokens)], 20, tokenizer.eos_id, sampling)
    whole = loaded.tokenizer.decode([*tokens[1:], *continuation.tokens])
    assert PROMPT + done[0].printed == whole + "\n"


@ONLY_BPE
def test_modes_and_seeds(run: Path, tool: Tool) -> None:
    def text(*options: object, prompt: str = PROMPT) -> str:
        done = tool("generate.py", run, prompt, "--max-new-tokens", 12, *options)
        assert done.code == 0, done.error
        return done.printed

    by_mode = [text("--mode", mode) for mode in ("S2S", "NLU", "NLG", "none")]
    assert len(set(by_mode)) == 4
    assert text() == by_mode[0]
    assert text(prompt=f"[NLU] {PROMPT}") == by_mode[1]  # the text's own mode
    seeds = [text("--temperature", 1, "--seed", seed) for seed in (0, 1)]
    assert seeds[0] != seeds[1]
    assert seeds == [text("--temperature", 1, "--seed", seed) for seed in (0, 1)]


@ONLY_BPE
@pytest.mark.parametrize("options", [(), ("--infill",)], ids=["continue", "infill"])
def test_causal_is_what_transformers_generates(run: Path, exported: Path, options: tuple[str, ...], tool: Tool) -> None:
    """Its own generate() sees the prompt from left to right."""
    text = HOLES if options else PROMPT
    done = tool("generate.py", run, text, "--causal", "--max-new-tokens", 12, *options)
    assert done.code == 0, done.error
    assert done.printed != tool("generate.py", run, text, "--max-new-tokens", 12, *options).printed
    loaded = load_prefix_model(exported)
    sentinels = sentinel_ids(loaded.tokenizer)
    tokens = prompt_tokens(loaded.tokenizer, text, "[NLU]" if options else "[S2S]")
    start = [*tokens, sentinels[0]] if options else tokens
    answer = loaded.model.generate(torch.tensor([start]), max_new_tokens=12, do_sample=False)[0, len(start) :].tolist()
    if loaded.tokenizer.eos_token_id in answer:
        answer = answer[: answer.index(loaded.tokenizer.eos_token_id)]
    whole = filled(tokens, answer, sentinels, is_complete=True) if options else [*tokens, *answer]
    assert ("" if options else text) + done.printed == loaded.tokenizer.decode(whole[1:]) + "\n"


@ONLY_BPE
def test_infilling_prints_the_filled_text(run: Path, exported: Path, tokenizer: Tokenizer, tool: Tool) -> None:
    done = tool("generate.py", run, HOLES, "--infill", "--max-new-tokens", 12)
    assert done.code == 0, done.error
    assert done == tool("generate.py", exported, HOLES, "--infill", "--max-new-tokens", 12)
    loaded = load_prefix_model(exported)
    tokens, sentinels = prompt_tokens(loaded.tokenizer, HOLES, "[NLU]"), tokenizer.sentinel_ids.tolist()
    assert tokens[0] == tokenizer.mode_ids["[NLU]"]
    (answer,) = generate(loaded.model, [Prompt([*tokens, sentinels[0]], len(tokens))], 12, tokenizer.eos_id)
    whole = filled(tokens, answer.tokens, sentinels, is_complete=True)
    assert done.printed == loaded.tokenizer.decode(whole[1:]) + "\n"


SENTINELS = [101, 102, 103]


@pytest.mark.parametrize(
    ("answer", "partial", "complete"),
    [
        ([], [1], [1, 2, 102, 3]),
        ([7, 8], [1, 7, 8], [1, 7, 8, 2, 102, 3]),
        ([7, 102], [1, 7, 2], [1, 7, 2, 3]),
        ([7, 102, 9], [1, 7, 2, 9], [1, 7, 2, 9, 3]),
        ([7, 102, 9, 103, 5], [1, 7, 2, 9, 3], [1, 7, 2, 9, 3]),  # a sentinel that the prompt lacks
        ([7, 103, 5, 102, 9], [1, 7, 2, 9], [1, 7, 2, 9, 3]),
        ([102, 9, 101, 7, 102, 8], [1, 2, 9, 3], [1, 2, 9, 3]),  # the first span of each counts
        ([7, 101, 8], [1, 7, 2], [1, 7, 2, 102, 3]),
    ],
)
def test_spans_go_into_their_places(answer: list[int], partial: list[int], complete: list[int]) -> None:
    tokens = [1, 101, 2, 102, 3]
    assert filled(tokens, answer, SENTINELS, is_complete=True) == complete
    shown = filled(tokens, answer, SENTINELS, is_complete=False)
    assert complete[: len(shown)] == shown  # what has been printed stays
    assert shown == partial


def test_the_prompt_of_missing_words() -> None:
    prompt = infilling_prompt([1, 101, 2, 102], SENTINELS)
    assert (list(prompt.tokens), prompt.prefix_length) == ([1, 101, 2, 102, 101], 4)
    for tokens in ([1, 2], [101, 103], [102, 101], [101, 101], [102], []):
        with pytest.raises(ConfigError, match="missing words"):
            infilling_prompt(tokens, SENTINELS)


@pytest.fixture
def theirs(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return tokenizer_to_hugging_face(tokenizer, "ul2", 100)


def test_missing_words_come_back_in_place(tokenizer: Tokenizer, theirs: PreTrainedTokenizerFast) -> None:
    """A text with spans cut out as pretraining does, and filled with them, is the text."""
    sentinels = sentinel_ids(theirs)
    assert sentinels == tokenizer.sentinel_ids.tolist()
    tokens = tokenizer.encode("The value of the name is\na class of objects.").tolist()
    first, second, third = tokens[1:3], tokens[5:6], tokens[-2:]
    holes = [tokens[0], sentinels[0], *tokens[3:5], sentinels[1], *tokens[6:-2], sentinels[2]]
    answer = [*first, sentinels[1], *second, sentinels[2], *third]
    assert filled(holes, answer, sentinels, is_complete=True) == tokens
    stream, shown = TextStream(theirs), ""
    for end in range(len(answer) + 1):
        shown += stream.update(filled(holes, answer[:end], sentinels, is_complete=False))
    assert shown + stream.update(tokens, is_complete=True) == theirs.decode(tokens)


@pytest.mark.parametrize(
    "text", ["two words", "caf\u00e9 \u4f60\u597d \U0001f600!", "a\n  b\n\n", " leading", "[MASK] x <extra_id_0>y", ""]
)
def test_a_stream_is_the_text(theirs: PreTrainedTokenizerFast, text: str) -> None:
    tokens = prompt_tokens(theirs, text, "[S2S]")
    for start in range(1, len(tokens) + 1):
        stream, parts = TextStream(theirs, tokens[:start]), []
        parts = [stream.update(tokens[:end]) for end in range(start, len(tokens) + 1)]
        parts.append(stream.update(tokens, is_complete=True))
        before = theirs.decode(tokens[1:start])
        if "\ufffd" not in before:
            assert "".join(parts) == theirs.decode(tokens[1:])[len(before) :]
            assert "\ufffd" not in "".join(parts)


@pytest.mark.parametrize("before", ["", "a prompt", "a prompt\n", "caf\u00e9", "\u4f60\n"])
def test_bytes_of_no_character_hide_no_text(tokenizer: Tokenizer, theirs: PreTrainedTokenizerFast, before: str) -> None:
    """A model that is small or hot writes them."""
    vocabulary, rng = theirs.get_vocab(), np.random.default_rng(0)
    parts = [[vocabulary[f"<0x{byte:02X}>"]] for byte in (0x0A, 0x80, 0xA9, 0xC3, 0xE4, 0xFF)]
    parts += [tokenizer.encode(text).tolist() for text in ("the name", "\u00e9", "\u4f60", "of a\n")]
    for _ in range(100):
        tokens = tokenizer.encode(before).tolist()
        stream, shown = TextStream(theirs, tokens), before
        for part in rng.integers(len(parts), size=12):
            for token in parts[part]:
                tokens.append(token)
                shown += stream.update(tokens)
        shown += stream.update(tokens, is_complete=True)
        whole = tokenizer.decode(tokens)
        assert re.findall("[a-z]+", shown) == re.findall("[a-z]+", whole)
    ends = [*tokenizer.encode(before).tolist(), vocabulary["<0xE4>"], *tokenizer.encode("the name").tolist()]
    stream = TextStream(theirs, tokenizer.encode(before).tolist())
    assert stream.update(ends) == "\ufffd the name"


def test_a_prompt_has_its_mode(tokenizer: Tokenizer, theirs: PreTrainedTokenizerFast) -> None:
    plain = tokenizer.encode("the name").tolist()
    assert mode_ids(theirs) == tokenizer.mode_ids
    assert prompt_tokens(theirs, "the name", None) == plain
    assert prompt_tokens(theirs, "the name", "[NLG]") == [tokenizer.mode_ids["[NLG]"], *plain]
    assert prompt_tokens(theirs, "[NLU] the name", "[NLG]") == [tokenizer.mode_ids["[NLU]"], *plain]
    with pytest.raises(ConfigError, match=r"no mode \[XYZ\]"):
        prompt_tokens(theirs, "the name", "[XYZ]")


@ONLY_BPE
def test_bad_input_is_refused(run: Path, exported: Path, tokenizer: Tokenizer, tool: Tool, tmp_path: Path) -> None:
    def refused(*words: object, at: Path = exported, prompt: str = PROMPT, options: tuple[object, ...] = ()) -> bool:
        done: Done = tool("generate.py", at, prompt, *options)
        return is_refused(done, *words) and not done.printed

    assert refused("no such folder", at=tmp_path / "nothing")
    assert refused("no such folder", at=exported / "config.json")
    assert refused("no checkpoint", at=tmp_path / "data")
    assert refused("longest sequence is 48", prompt="the name " * 60)
    assert refused("missing words", options=("--infill",))
    assert refused("<extra_id_1>", "in order", prompt="a <extra_id_1> b", options=("--infill",))
    assert refused("temperature", options=("--top-p", "0.5"))
    assert refused("temperature=-1.0", options=("--temperature=-1",))
    assert refused("top_p=7.0", options=("--temperature", 1, "--top-p", 7))
    assert refused("max_new_tokens=0", options=("--max-new-tokens", 0))
    assert refused("empty", prompt="", options=("--mode", "none"))
    assert refused("'\\ud800'", "UTF-8", prompt="a \ud800 b")
    assert refused("'\\udcff'", "UTF-8", prompt="a byte \udcff", options=("--infill",))
    assert refused("Leave it out", options=("--tokenizer", "x.model"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (exported / name).unlink()
    assert refused("no tokenizer", "--tokenizer FILE")


@ONLY_BPE
def test_damaged_folders_are_refused(exported: Path, tool: Tool) -> None:
    weights, config = exported / "model.safetensors", exported / "config.json"
    whole, settings = weights.read_bytes(), json.loads(config.read_text())
    for content in (whole[:-1], whole[:100], b""):
        weights.write_bytes(content)
        assert is_refused(tool("generate.py", exported, PROMPT), exported, "cannot be loaded")
    weights.unlink()
    assert is_refused(tool("generate.py", exported, PROMPT), exported, "cannot be loaded")
    weights.write_bytes(whole)
    for changes, word in (
        ({"num_hidden_layers": 3}, "lacks 9 of the tensors"),
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"hidden_size": "wide"}, "cannot be loaded"),
    ):
        config.write_text(json.dumps({**settings, **changes}))
        assert is_refused(tool("generate.py", exported, PROMPT), exported, word)
    config.write_text("{")
    assert is_refused(tool("generate.py", exported, PROMPT), config, "cannot be read")


@ONLY_BPE
def test_a_tokenizer_of_another_model_is_refused(exported: Path, prose: list[str], tool: Tool) -> None:
    larger = train_tokenizer([TextSource(["\n".join(prose[:30])])], TokenizerSettings(vocab_size=710, num_sentinels=8))
    tokenizer_to_hugging_face(larger, "ul2", 48).save_pretrained(exported)
    assert is_refused(tool("generate.py", exported, PROMPT), "710 entries, the model 700")


@ONLY_BPE
@pytest.mark.parametrize("kind", ["bert", "rotary bert"])
def test_bert_is_for_filling_in(
    tmp_path: Path, groups: ProcessGroups, tokenizer: Tokenizer, kind: str, export: Tool, tool: Tool
) -> None:
    run_folder(tmp_path / "run", groups, model_of(kind, tokenizer.vocab_size), tokenizer)
    assert export(tmp_path / "run", tmp_path / "out").code == 0
    assert is_refused(tool("generate.py", tmp_path / "run", PROMPT), "BERT", "fill-mask", "export_hf.py")
    assert is_refused(tool("generate.py", tmp_path / "out", PROMPT), "BERT", "fill-mask", tmp_path / "out")


@ONLY_BPE
def test_a_checkpoint_outside_of_its_run_needs_the_tokenizer_named(run: Path, tokenizer: Tokenizer, tool: Tool) -> None:
    alone = (run / "checkpoints" / "step-00000003").rename(run.parent / "step-00000003")
    assert is_refused(tool("generate.py", alone, PROMPT), "--tokenizer FILE")
    named = run.parent / "data" / "tokenizer.model"
    done = tool("generate.py", alone, PROMPT, "--tokenizer", named, "--max-new-tokens", 3)
    assert done.code == 0, done.error
    named.write_bytes(tokenizer.model + b"\x12\x00")
    other = tool("generate.py", alone, PROMPT, "--tokenizer", named)
    assert is_refused(other, "not the one that the model was trained with")
    assert "export the weights" not in other.error


@ONLY_BPE
def test_a_text_at_the_longest_sequence_says_so(run: Path, tool: Tool) -> None:
    done = tool("generate.py", run, PROMPT)
    assert done.code == 0
    assert "longest sequence, 48 tokens" in done.error


@ONLY_BPE
def test_16_bits(run: Path, export: Tool, tool: Tool) -> None:
    assert export(run, run.parent / "half", "--precision", "bf16").code == 0
    assert load_prefix_model(run.parent / "half").model.dtype == torch.bfloat16
    assert tool("generate.py", run.parent / "half", PROMPT, "--max-new-tokens", 5).code == 0
    assert AutoTokenizer.from_pretrained(run.parent / "half").eos_token_id is not None
