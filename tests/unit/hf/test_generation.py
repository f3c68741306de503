"""Generation from the cache against full forward passes of our own model, one for each token, and batches."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.generation import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from raptr_ds.data.batch import Sample, collate
from raptr_ds.errors import ConfigError
from raptr_ds.hf.generation import GREEDY, Continuation, Prompt, Sampling, choose, generate
from raptr_ds.hf.model import to_hugging_face
from raptr_ds.model.stage import Stage, build_stage
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.paths import LayerPath
from raptr_ds.rng import stream
from tests.exported_runs import model_of

VOCABULARY = 61
NO_END = VOCABULARY  # an id that no token has
PROMPTS = [
    Prompt([7, 3, 9, 14, 2, 33, 40]),
    Prompt([5]),
    Prompt([8, 8, 1, 60], prefix_length=2),
    Prompt([11, 12, 13, 14, 15, 16, 17, 18, 19, 20], prefix_length=0),
    Prompt([5]),
]
SAMPLING = Sampling(temperature=1.3, top_k=20, top_p=0.9, seed=5)


@pytest.fixture
def stage(groups: ProcessGroups) -> Stage:
    model = model_of("ul2", VOCABULARY, init_method_std=0.3)  # so that what is likeliest depends on all that is seen
    return build_stage(model, groups, range(2), recompute=False, seed=1)


@pytest.fixture
def model(stage: Stage) -> LlamaForCausalLM:
    twin = to_hugging_face(stage.model, {name: p.detach() for name, p in stage.named_parameters()})
    assert isinstance(twin, LlamaForCausalLM)
    return twin


def next_log_probabilities(stage: Stage, tokens: Sequence[int], prefix_length: int) -> torch.Tensor:
    """Return (1, vocabulary): our model's full pass over all tokens, its last position."""
    every = np.arange(VOCABULARY)
    last = np.full(VOCABULARY, len(tokens) - 1)
    batch = collate([Sample(np.array(tokens), last, every, prefix_length)], [0], stage.model.seq_length, pad_id=0)
    with torch.no_grad():
        return -stage(batch.tokens, batch, LayerPath.full(2), None)[None]


def expected(stage: Stage, prompt: Prompt, max_new_tokens: int, sampling: Sampling, repetition: int = 0) -> list[int]:
    """Return the continuation token by token, without a cache."""
    tokens, draws = list(prompt.tokens), stream(sampling.seed, "generation", repetition, *prompt.tokens)
    prefix_length = len(tokens) if prompt.prefix_length is None else prompt.prefix_length
    for _ in range(max_new_tokens):
        logits = next_log_probabilities(stage, tokens, prefix_length)
        tokens.append(int(choose(logits, sampling, torch.tensor([draws.random()], dtype=torch.float64))))
    return tokens[len(prompt.tokens) :]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLING], ids=["greedy", "drawn"])
def test_a_batch_gives_what_full_passes_over_each_prompt_give(
    stage: Stage, model: LlamaForCausalLM, sampling: Sampling
) -> None:
    batch = generate(model, PROMPTS, 12, NO_END, sampling)
    wanted = [expected(stage, prompt, 12, sampling, int(number == 4)) for number, prompt in enumerate(PROMPTS)]
    assert [list(continuation.tokens) for continuation in batch] == wanted
    assert {continuation.end for continuation in batch} == {"max_new_tokens"}
    assert len({tuple(tokens) for tokens in wanted}) >= 4  # the test could not fail if all were the same


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLING], ids=["greedy", "drawn"])
def test_each_alone_gives_what_the_batch_gives(model: LlamaForCausalLM, sampling: Sampling) -> None:
    batch = generate(model, PROMPTS, 10, NO_END, sampling)
    for prompt, continuation in zip(PROMPTS[:4], batch[:4], strict=True):
        assert generate(model, [prompt], 10, NO_END, sampling) == [continuation]
    assert generate(model, PROMPTS[::-1], 10, NO_END, GREEDY) == generate(model, PROMPTS, 10, NO_END, GREEDY)[::-1]


def test_equal_prompts_are_drawn_for_anew_and_seeds_differ(model: LlamaForCausalLM) -> None:
    four = generate(model, [PROMPTS[0]] * 4, 10, NO_END, SAMPLING)
    assert len({continuation.tokens for continuation in four}) == 4
    assert generate(model, [PROMPTS[0]] * 4, 10, NO_END, SAMPLING) == four
    other = generate(model, [PROMPTS[0]], 10, NO_END, Sampling(1.3, 20, 0.9, seed=6))
    assert other[0] not in four
    numbered = [replace(PROMPTS[0], repeat=repeat) for repeat in (2, 0, 3)]  # as where others have the rest
    assert generate(model, numbered, 10, NO_END, SAMPLING) == [four[2], four[0], four[3]]


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.5}], ids=str)
@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-200])
def test_almost_no_temperature_takes_the_likeliest(temperature: float, options: dict[str, Any]) -> None:
    logits = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(0))
    draws = torch.tensor([0.0, 0.3, 0.9, 1.0 - 2.0**-53], dtype=torch.float64)
    assert torch.equal(choose(logits, Sampling(temperature, **options), draws), logits.argmax(-1))


def test_the_prefix_is_seen_in_both_directions(model: LlamaForCausalLM) -> None:
    """The comparisons above would show nothing if the mask made no difference."""
    both = generate(model, [PROMPTS[0]], 12, NO_END)
    causal = generate(model, [Prompt(PROMPTS[0].tokens, prefix_length=0)], 12, NO_END)
    assert both != causal
    plain = model.generate(torch.tensor([PROMPTS[0].tokens]), max_new_tokens=12, do_sample=False)
    assert plain[0, 7:].tolist() == list(causal[0].tokens)


def test_eager_attention_and_16_bits_run_too(model: LlamaForCausalLM) -> None:
    wanted = generate(model, PROMPTS, 12, NO_END)
    model.set_attn_implementation("eager")
    assert generate(model, PROMPTS, 12, NO_END) == wanted
    for dtype in (torch.bfloat16, torch.float16):
        model.to(dtype)  # type: ignore[arg-type]
        for prompt, continuation in zip(PROMPTS, generate(model, PROMPTS, 3, NO_END), strict=True):
            assert all(0 <= token < VOCABULARY for token in continuation.tokens), prompt


def test_a_text_ends_at_its_end_and_others_go_on(model: LlamaForCausalLM) -> None:
    free = generate(model, PROMPTS, 12, NO_END)
    end = next(token for token in free[0].tokens[1:] if token not in {*free[0].tokens[:1], *free[3].tokens})
    seen: list[tuple[int, int]] = []
    ended = generate(model, PROMPTS, 12, end, on_token=lambda row, token: seen.append((row, token)))
    assert ended[0] == Continuation(free[0].tokens[: free[0].tokens.index(end)], "end of text")
    assert ended[3] == free[3]
    for number, continuation in enumerate(ended):
        assert tuple(token for row, token in seen if row == number) == continuation.tokens


def test_generation_stops_at_the_longest_sequence(stage: Stage, model: LlamaForCausalLM) -> None:
    long, short = generate(model, [PROMPTS[3], PROMPTS[1]], 20, NO_END)
    assert (len(long.tokens), long.end) == (14, "longest sequence")
    assert list(long.tokens) == expected(stage, PROMPTS[3], 14, GREEDY)
    assert (len(short.tokens), short.end) == (20, "max_new_tokens")
    (last,) = generate(model, [Prompt(range(1, 24))], 5, NO_END)
    assert (len(last.tokens), last.end) == (1, "longest sequence")


@pytest.mark.parametrize(
    ("prompts", "max_new_tokens", "message"),
    [
        ([Prompt([])], 5, "prompt 0 is empty"),
        ([Prompt([1]), Prompt(range(24))], 5, "prompt 1 has 24 tokens.*longest sequence is 24.*to 23"),
        ([Prompt([1])], 0, "max_new_tokens=0"),
    ],
)
def test_prompts_that_cannot_be_continued(
    model: LlamaForCausalLM, prompts: list[Prompt], max_new_tokens: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(model, prompts, max_new_tokens, NO_END)


def test_nothing_to_continue(model: LlamaForCausalLM) -> None:
    assert generate(model, [], 5, NO_END) == []


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": 1.0, "top_k": 0},
        {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 1.0, "top_p": 1.1},
        {"temperature": 1.0, "top_p": float("nan")},
        {"top_p": 0.9},
        {"top_k": 5},
    ],
    ids=str,
)
def test_sampling_that_makes_no_sense(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=list(values)[-1]):
        Sampling(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, None, None),
        (0.5, None, None),
        (2.0, 7, None),
        (1.0, None, 0.6),
        (1.5, 20, 0.8),
        (1.0, 1000, 1.0),
        (1.0, 1, 1e-9),
    ],
)
def test_draws_have_the_probabilities_of_transformers(
    temperature: float, top_k: int | None, top_p: float | None
) -> None:
    """Evenly spread draws hit each token as often as its probability wants, to one draw."""
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    probabilities = warpers(torch.zeros(1, 1, dtype=torch.int64), logits.clone()).softmax(-1)[0]  # type: ignore[arg-type]
    count = 20_000
    draws = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    sampling = Sampling(temperature, top_k, top_p)
    drawn = choose(logits.expand(count, -1), sampling, draws).bincount(minlength=VOCABULARY)
    assert (drawn - probabilities * count).abs().max() <= 1.0
    for extreme in (0.0, 1.0 - 2.0**-53):
        assert probabilities[choose(logits, sampling, torch.tensor([extreme], dtype=torch.float64))] > 0
