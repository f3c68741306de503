"""Our model class of the harness: against full attention for each request alone, and the harness's own class."""

import copy
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from raptr_ds.errors import ConfigError
from raptr_ds.evaluation.gold_bits import GoldInstance
from raptr_ds.evaluation.language_model import PrefixLM
from raptr_ds.evaluation.ranks import Ranks
from raptr_ds.hf.generation import Prompt, generate
from raptr_ds.hf.load import PrefixModel
from tests.small_tasks import LONGEST, words

CONTEXTS = [" ".join(words(seed)[: 3 + 5 * (seed % 5)]) for seed in range(6)]
PAIRS = [
    *[(context, " " + " ".join(words(90 + number)[: 1 + number])) for context in CONTEXTS for number in range(4)],
    *[(" ".join(words(7)[:40]), " ab"), ("", "words without a context"), ("a space at the end ", "b")],
]
OPTIONS = {"until": ["\n", "."], "do_sample": False, "temperature": 0.0, "max_gen_toks": 12}


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [
        Instance(kind, {}, argument, 0, ("made_up", number, 1))  # type: ignore[arg-type]
        for number, argument in enumerate(arguments)
    ]


def full_attention(model: PrefixModel, tokens: list[int], num_scored: int, prefix_length: int) -> tuple[float, bool]:
    """Return the log-likelihood of the last tokens and whether they are the likeliest, by one pass and its 4-D mask."""
    length = len(tokens)
    mask = torch.full((length, length), torch.finfo(model.model.dtype).min, dtype=model.model.dtype)
    for query in range(length):
        mask[query, : max(query + 1, prefix_length)] = 0.0
    with torch.no_grad():
        logits = model.model(torch.tensor([tokens]), attention_mask=mask[None, None]).logits[0]
    logs = logits.log_softmax(-1)
    places = range(length - num_scored, length)
    total = sum(float(logs[place - 1, tokens[place]]) for place in places)
    return total, all(int(logs[place - 1].argmax()) == tokens[place] for place in places)


def split(model: PrefixLM, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Return the tokens of both, by the rule of the harness's base class."""
    if not context:
        return [], model.tok_encode(continuation)
    return model._encode_pair(context, continuation)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("causal", [False, True], ids=["prefix", "causal"])
def test_scores_are_those_of_full_attention(
    loaded: PrefixModel, causal: bool, dtype: torch.dtype, tolerance: float
) -> None:
    """Relative tolerances: rounding of sums in another order."""
    wide = PrefixModel(copy.deepcopy(loaded.model).to(dtype), loaded.tokenizer)  # type: ignore[arg-type]
    model = PrefixLM(wide, causal=causal, batch_size=4)
    (mode,) = model._mode
    for (log, is_greedy), pair in zip(model.loglikelihood(requests("loglikelihood", PAIRS)), PAIRS, strict=True):
        context, continuation = split(model, *pair)
        context = context[max(0, len(context) + len(continuation) - LONGEST) :]
        tokens = [mode, *context, *continuation]
        prefix = 0 if causal else 1 + len(context)
        assert (log, is_greedy) == (
            pytest.approx(full_attention(wide, tokens, len(continuation), prefix)[0], rel=tolerance),
            full_attention(wide, tokens, len(continuation), prefix)[1],
        ), pair


def test_the_mask_and_the_mode_matter(loaded: PrefixModel) -> None:
    """The comparisons would show nothing if they did not."""
    asked = requests("loglikelihood", PAIRS[:8])
    prefix = PrefixLM(loaded).loglikelihood(asked)
    assert prefix != PrefixLM(loaded, causal=True).loglikelihood(asked)
    assert prefix != PrefixLM(loaded, mode="NLG").loglikelihood(asked)


@pytest.fixture(scope="module")
def theirs(exported: Path) -> HFLM:
    return HFLM(pretrained=str(exported), device="cpu", batch_size=4, backend="causal", dtype="float32")


def test_left_to_right_without_a_mode_it_is_the_harness_own_class(theirs: HFLM, loaded: PrefixModel) -> None:
    ours = PrefixLM(loaded, mode=None, causal=True, batch_size=4)
    asked = requests("loglikelihood", PAIRS)
    wanted = theirs.loglikelihood(asked, disable_tqdm=True)
    found = ours.loglikelihood(asked)
    assert [log for log, _ in found] == pytest.approx([log for log, _ in wanted], rel=1e-5)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in wanted]


def test_whole_texts_are_scored_as_the_harness_own_class_does(theirs: HFLM, loaded: PrefixModel) -> None:
    ours = PrefixLM(loaded, mode=None, causal=True, batch_size=4)
    texts = [(" ".join([*words(seed), *words(seed + 1)][:length]),) for seed, length in enumerate((1, 5, 30, 80))]
    assert max(len(ours.tok_encode(text)) for (text,) in texts) > 2 * LONGEST  # several windows
    asked = requests("loglikelihood_rolling", texts)
    wanted = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert ours.loglikelihood_rolling(asked) == pytest.approx(wanted, rel=1e-5)


def test_continuations_are_those_of_the_harness_own_class(theirs: HFLM, loaded: PrefixModel) -> None:
    ours = PrefixLM(loaded, mode=None, causal=True, batch_size=4)
    asked = requests("generate_until", [(context, OPTIONS) for context in [*CONTEXTS, " ".join(words(7))]])
    wanted = theirs.generate_until(asked, disable_tqdm=True)
    assert ours.generate_until(asked) == wanted
    assert len(set(wanted)) > 4


def test_generation_sees_the_prefix_in_both_directions_and_stops(loaded: PrefixModel) -> None:
    model = PrefixLM(loaded, batch_size=4)
    texts = model.generate_until(requests("generate_until", [(context, OPTIONS) for context in CONTEXTS]))
    for context, text in zip(CONTEXTS, texts, strict=True):
        prompt = Prompt([*model._mode, *model.tok_encode(context)])
        (whole,) = generate(loaded.model, [prompt], 12, model.eot_token_id)
        full = model._decode(whole.tokens)
        assert text == full.split("\n")[0].split(".")[0]
    stop = texts[0][1:3]
    asked = requests("generate_until", [(CONTEXTS[0], {**OPTIONS, "until": [stop]})])
    assert model.generate_until(asked) == [texts[0][: texts[0].index(stop)]]


@pytest.mark.parametrize("batch_size", [16, 3, 1])
def test_draws_do_not_depend_on_batches_and_ranks(
    loaded: PrefixModel, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    """The same request eight times, among others: eight draws, the same in batches of any size, on one rank or two."""
    options = {"until": [], "do_sample": True, "temperature": 1.0, "max_gen_toks": 20}
    asked = requests("generate_until", [(context, options) for context in (CONTEXTS[1], *[CONTEXTS[0]] * 8)])
    wanted = PrefixLM(loaded, batch_size=9).generate_until(asked)
    assert len(set(wanted[1:])) == 8
    assert PrefixLM(loaded, batch_size=batch_size).generate_until(asked) == wanted
    parts: list[dict[int, str]] = []
    monkeypatch.setattr(Ranks, "merge", lambda self, part: parts.append(part) or dict.fromkeys(range(9), ""))
    for rank in range(2):
        PrefixLM(loaded, batch_size=batch_size, ranks=Ranks(rank, 2)).generate_until(asked)
    assert [(parts[0] | parts[1])[number] for number in range(len(asked))] == wanted


def test_a_continuation_without_tokens_is_certain_and_changes_no_other(loaded: PrefixModel) -> None:
    model = PrefixLM(loaded)
    others = requests("loglikelihood", [("some words", " ab"), ("other words", " abd")])
    empty = requests("loglikelihood", [(" ".join(words(3)[:20]), ""), ("", "")])
    found = model.loglikelihood([*others, *empty])
    assert [log for log, _ in found[:2]] == pytest.approx([log for log, _ in model.loglikelihood(others)], rel=1e-5)
    assert found[2:] == model.loglikelihood(empty) == [(0.0, True)] * 2


def test_long_contexts_lose_their_beginning_and_are_counted(loaded: PrefixModel) -> None:
    model = PrefixLM(loaded)
    long, kept = " ".join(words(3)), " ".join(words(3)[-8:])
    assert len(model.tok_encode(long)) > LONGEST
    model.loglikelihood(requests("loglikelihood", [(long, " a"), (kept, " a"), (long, " b")]))
    assert model.truncated == {0, 2}
    model.truncated.clear()
    model.generate_until(requests("generate_until", [(kept, OPTIONS), (long, OPTIONS)]))
    assert model.truncated == {1}


def test_a_model_shorter_than_the_tokens_to_generate_gets_half_a_sequence_of_them(loaded: PrefixModel) -> None:
    model = PrefixLM(loaded)
    (text,) = model.generate_until(requests("generate_until", [(" ".join(words(3)), {"until": []})]))
    assert text


def test_a_continuation_that_is_longer_than_the_model_is_refused(loaded: PrefixModel) -> None:
    long = " " + " ".join(words(3))
    with pytest.raises(ConfigError, match=rf"task made_up: a continuation has .* longest sequence is {LONGEST}"):
        PrefixLM(loaded).loglikelihood(requests("loglikelihood", [("a", long)]))
    gold = GoldInstance("loglikelihood", {}, ("a", long), 0, ("made_up", 0, 1))
    others = requests("loglikelihood", [("a", " b"), ("c", " d")])
    first, none, last = PrefixLM(loaded).loglikelihood([others[0], gold, others[1]])
    assert none is None
    assert [first, last] == PrefixLM(loaded).loglikelihood(others)


@pytest.mark.parametrize("mode", ["S2S", None])
def test_the_longest_continuation_that_is_taken(loaded: PrefixModel, mode: str | None) -> None:
    """It has as many tokens as the model's longest sequence: its last one is no input."""
    model = PrefixLM(loaded, mode=mode)
    for length in range(LONGEST - 1, LONGEST + 2):
        asked = [(("", ""), [], list(range(20, 20 + length)))]
        if length <= LONGEST:
            assert model._loglikelihood_tokens(asked)[0][0] < 0
        else:
            with pytest.raises(ConfigError, match=f"longest sequence is {LONGEST}"):
                model._loglikelihood_tokens(asked)


@pytest.mark.parametrize("batch_size", ["auto", "0", -1, "4.5"])
def test_a_batch_size_that_is_no_number(loaded: PrefixModel, batch_size: str | int) -> None:
    with pytest.raises(ConfigError, match=f"batch_size={batch_size}"):
        PrefixLM(loaded, batch_size=batch_size)


def test_a_mode_that_the_tokenizer_lacks(loaded: PrefixModel) -> None:
    with pytest.raises(ConfigError, match=r"no mode \[XYZ\]; it has .*\[S2S\].*or no mode"):
        PrefixLM(loaded, mode="XYZ")


def test_the_harness_makes_it_by_its_name(exported: Path) -> None:
    from lm_eval.api.registry import get_model

    model = get_model("raptr_ds").create_from_arg_string(f"pretrained={exported},mode=none", {"batch_size": 2})
    assert isinstance(model, PrefixLM)
    assert (model._mode, model.num_rows) == ([], 2)
