"""Text from a prefix language model in transformers, whose prompt is seen in both directions.

transformers' own generate() takes no such mask. Here the prompt goes through the model once, under its mask, and the
tokens that follow are decoded from the cache: the same as a full pass for each of them.
"""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from transformers import DynamicCache, LlamaForCausalLM

from raptr_ds.errors import ConfigError
from raptr_ds.rng import stream

End = Literal["end of text", "max_new_tokens", "longest sequence", "stopped"]


@dataclass(frozen=True)
class Prompt:
    """Tokens to continue.

    prefix_length: leading ones that see each other in both directions; all if None. repeat: which of equal prompts it
    is, where these are in several batches; by default its place among those of its own.
    """

    tokens: Sequence[int]
    prefix_length: int | None = None
    repeat: int | None = None


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen: the likeliest at temperature 0, else a draw.

    A draw is among the top_k likeliest tokens, and among as few as have top_p of the probability. What is drawn for a
    prompt depends on the seed, the prompt, and which of equal prompts it is: never on the rest of a batch.
    Raises: ConfigError for values that are none.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature}: give 0, for the likeliest token, or a number above it.")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k}: give a number of tokens to draw from, at least 1.")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p={self.top_p}: give a share of the probability above 0 and up to 1.")
        if self.temperature == 0.0 and (self.top_k, self.top_p) != (None, None):
            raise ConfigError(
                "top_k and top_p choose among draws, and at temperature 0 the likeliest token is taken. Give a "
                "temperature, such as 0.8, or leave them out."
            )


GREEDY = Sampling()


@dataclass(frozen=True)
class Continuation:
    """What follows a prompt, without the token that ends a text. end: why there is no more."""

    tokens: tuple[int, ...]
    end: End


@torch.inference_mode()
def generate(
    model: LlamaForCausalLM,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    end_id: int,
    sampling: Sampling = GREEDY,
    on_token: Callable[[int, int], bool | None] | None = None,
) -> list[Continuation]:
    """Return the continuation of each prompt: what the prompt alone would have, in one batch.

    model: in evaluation mode. end_id: the token that ends a text. on_token: called with a prompt's number and each of
    its new tokens as it comes; returns True where the continuation is to end with this token.
    Raises: ConfigError for a prompt that is empty, or leaves no room for a token.
    """
    if not prompts:
        return []
    rooms = _rooms(prompts, model.config.max_position_embeddings, max_new_tokens)
    new: list[list[int]] = [[] for _ in prompts]
    ends: list[End | None] = [None for _ in prompts]
    streams = _streams(prompts, sampling)
    cache = DynamicCache(config=model.config)
    tokens, positions, mask = _prefill(prompts, model)
    while True:
        # By place: the cache's name is not the same in all of transformers 5.
        logits = model(tokens, mask, positions, cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        draws = torch.tensor([stream.random() for stream in streams], dtype=torch.float64, device=logits.device)
        chosen = choose(logits, sampling, draws)
        for row, token in enumerate(chosen.tolist()):
            if ends[row] is not None:
                continue
            if token == end_id:
                ends[row] = "end of text"
                continue
            new[row].append(token)
            if len(new[row]) == rooms[row]:
                ends[row] = "max_new_tokens" if rooms[row] == max_new_tokens else "longest sequence"
            if on_token is not None and on_token(row, token):
                ends[row] = ends[row] or "stopped"
        if all(ends):
            break
        tokens, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask[:, :, -1:], torch.zeros_like(mask[:, :, -1:, :1])], dim=-1)
    return [Continuation(tuple(ids), end or "stopped") for ids, end in zip(new, ends, strict=True)]


def choose(logits: torch.Tensor, sampling: Sampling, draws: torch.Tensor) -> torch.Tensor:
    """Return a token for each row.

    Shapes: logits (b, vocabulary); draws (b,) fp64, uniform in [0, 1), of which temperature 0 uses none; returns (b,).
    """
    if sampling.temperature == 0.0:
        return logits.argmax(-1)
    # Below the likeliest, and divided by no less than a number whose reciprocal is one: what overflows is improbable.
    below = logits.double() - logits.double().amax(-1, keepdim=True)
    values, order = (below / max(sampling.temperature, sys.float_info.min)).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        values[:, sampling.top_k :] = -torch.inf
    probabilities = values.softmax(-1)
    if sampling.top_p is not None:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    cumulative = probabilities.cumsum(-1)
    place = torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True)
    last = (probabilities > 0).sum(-1, keepdim=True) - 1  # where rounding would lead beyond all of them
    return order.gather(-1, torch.minimum(place, last))[:, 0]


def _rooms(prompts: Sequence[Prompt], longest: int, max_new_tokens: int) -> list[int]:
    """Return how many tokens may follow each prompt. longest: sequence that the model takes. Raises: ConfigError."""
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens}: give at least 1.")
    rooms = []
    for number, prompt in enumerate(prompts):
        length = len(prompt.tokens)
        if not length:
            raise ConfigError(f"prompt {number} is empty: the model needs a token to begin with, such as its mode.")
        if length >= longest:
            raise ConfigError(
                f"prompt {number} has {length:,} tokens, its mode included, and the model's longest sequence is "
                f"{longest:,}: shorten the prompt to {longest - 1:,} at most."
            )
        rooms.append(min(max_new_tokens, longest - length))
    return rooms


def _streams(prompts: Sequence[Prompt], sampling: Sampling) -> list[np.random.Generator]:
    seen: Counter[tuple[int, ...]] = Counter()
    streams = []
    for prompt in prompts:
        tokens = tuple(map(int, prompt.tokens))
        repeat = seen[tokens] if prompt.repeat is None else prompt.repeat
        streams.append(stream(sampling.seed, "generation", repeat, *tokens))
        seen[tokens] += 1
    return streams


def _prefill(prompts: Sequence[Prompt], model: LlamaForCausalLM) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens and positions (b, T), padded on the left, and the mask (b, 1, T, T) that is added to scores."""
    lengths = torch.tensor([len(prompt.tokens) for prompt in prompts])
    prefixes = torch.tensor([len(p.tokens) if p.prefix_length is None else p.prefix_length for p in prompts])
    longest = int(lengths.max())
    tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt.tokens) :] = torch.tensor(prompt.tokens)
    position = torch.arange(longest) - (longest - lengths[:, None])
    key, query = position[:, None, :], position[:, :, None]
    seen = (key >= 0) & ((key <= query) | (key < prefixes[:, None, None]))
    seen |= torch.eye(longest, dtype=torch.bool)  # padding sees itself, so that no row is empty
    mask = torch.zeros(seen.shape, dtype=model.dtype).masked_fill_(~seen, torch.finfo(model.dtype).min)[:, None]
    return tokens.to(model.device), position.clamp(min=0).to(model.device), mask.to(model.device)
