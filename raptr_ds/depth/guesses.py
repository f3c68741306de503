"""What a model fills in along any path, and how sure it is: masked words of BERT, missing or following ones of UL2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from raptr_ds.config.sections import Denoiser
from raptr_ds.data.batch import Sample, collate
from raptr_ds.data.denoisers import replace_spans
from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.depth.network import Network
from raptr_ds.paths.path import LayerPath

_CONTINUED_TOKENS = 12


@dataclass(frozen=True)
class Guess:
    """A token or several, and their probability; of several the geometric mean, NaN where that is not computed."""

    tokens: tuple[int, ...]
    probability: float


@dataclass(frozen=True)
class Blank:
    """A place that the model fills. guesses: the likeliest first. right: what the text has there."""

    guesses: tuple[Guess, ...]
    right: Guess


@dataclass(frozen=True)
class FilledText:
    """A text in parts: known tokens, and blanks: masked words, missing ones, or what follows."""

    kind: Literal["mask", "infill", "continue"]
    parts: tuple[tuple[int, ...] | Blank, ...]


def fill_masks(
    network: Network,
    path: LayerPath,
    tokens: np.ndarray,
    places: Sequence[int],
    right: Sequence[int],
    number: int,
    not_guessed: Sequence[int] = (),
) -> list[Blank]:
    """Return what BERT predicts at some places of a sample.

    Shapes: tokens (n,) int64, with [CLS], [SEP] and masks as they are; places: of the blanks; right: the tokens there.
    number: of guesses for each. not_guessed: tokens that are left out of these; probabilities are the model's.
    """
    sample = Sample(tokens, np.array(places, np.int64), np.array(right, np.int64), len(tokens))
    logits = network.logits(collate([sample], [0], len(tokens), pad_id=0), path)
    probabilities = logits.double().softmax(-1)
    guessable = probabilities.index_fill(-1, torch.tensor(not_guessed, dtype=torch.long), -1.0)
    best = guessable.topk(min(number, logits.shape[-1] - len(not_guessed)))
    return [
        Blank(
            tuple(Guess((token,), value) for token, value in zip(ids, values, strict=True)),
            Guess((answer,), float(row[answer])),
        )
        for ids, values, row, answer in zip(
            best.indices.tolist(), best.values.tolist(), probabilities, right, strict=True
        )
    ]


def masked_sentence(
    network: Network, path: LayerPath, tokenizer: Tokenizer, text: np.ndarray, places: Sequence[int], number: int = 3
) -> FilledText:
    """Return a text whose tokens at some places BERT fills in. Shapes: text (n,) int64.

    Newlines are not guessed: held-out sentences are shown without the line breaks that they had.
    """
    tokens = np.concatenate([[tokenizer.cls_id], text, [tokenizer.sep_id]])
    inside = [1 + place for place in places]
    tokens[inside] = tokenizer.mask_id
    blanks = fill_masks(network, path, tokens, inside, text[list(places)].tolist(), number, [tokenizer.newline_id])
    parts: list[tuple[int, ...] | Blank] = []
    begin = 0
    for place, blank in zip(places, blanks, strict=True):
        parts += [tuple(text[begin:place].tolist()), blank]
        begin = place + 1
    return FilledText("mask", (*parts, tuple(text[begin:].tolist())))


def infilled_sentence(
    network: Network,
    path: LayerPath,
    tokenizer: Tokenizer,
    text: np.ndarray,
    spans: Sequence[range],
    denoiser: Denoiser,
) -> FilledText:
    """Return a text whose spans UL2 fills in, as its span denoisers do, by the likeliest token at each place."""
    starts, lengths = np.array([span.start for span in spans]), np.array([len(span) for span in spans])
    sentinels = tokenizer.sentinel_ids
    inputs, _ = replace_spans(text, starts, lengths, sentinels)
    prompt = [*_mode(tokenizer, denoiser), *inputs.tolist()]
    ends = {tokenizer.eos_id, *sentinels.tolist()}
    answer = list(prompt)
    parts: list[tuple[int, ...] | Blank] = []
    begin = 0
    for number, span in enumerate(spans):
        answer.append(int(sentinels[number]))
        room = min(len(span) + 4, network.stage.model.seq_length - len(answer))
        guess = _likeliest(network, path, answer, len(prompt), ends, room)
        answer += guess.tokens
        right = Guess(tuple(text[span.start : span.stop].tolist()), math.nan)
        parts += [tuple(text[begin : span.start].tolist()), Blank((guess,), right)]
        begin = span.stop
    return FilledText("infill", (*parts, tuple(text[begin:].tolist())))


def continued_sentence(
    network: Network, path: LayerPath, tokenizer: Tokenizer, text: np.ndarray, known: int, denoiser: Denoiser
) -> FilledText:
    """Return the first `known` tokens of a text with what UL2 continues it by, the likeliest token at each place."""
    prompt = [*_mode(tokenizer, denoiser), *text[:known].tolist()]
    prefix = len(prompt) if denoiser.kind == "prefix" else 1
    room = min(_CONTINUED_TOKENS, network.stage.model.seq_length - len(prompt))
    guess = _likeliest(network, path, prompt, prefix, {tokenizer.eos_id}, room)
    right = Guess(tuple(text[known : known + _CONTINUED_TOKENS].tolist()), math.nan)
    return FilledText("continue", (tuple(text[:known].tolist()), Blank((guess,), right)))


def _mode(tokenizer: Tokenizer, denoiser: Denoiser) -> list[int]:
    return [] if denoiser.mode is None else [tokenizer.mode_ids[denoiser.mode]]


def _likeliest(
    network: Network, path: LayerPath, prompt: Sequence[int], prefix_length: int, ends: set[int], room: int
) -> Guess:
    """Return what follows a prompt up to one of `ends`, the likeliest token at each place; a full pass for each.

    At least one token, as in pretraining, where no span is empty.
    """
    tokens: list[int] = list(prompt)
    log_probabilities: list[float] = []
    while len(tokens) - len(prompt) < room:
        last = np.array([len(tokens) - 1])
        sample = Sample(np.array(tokens, np.int64), last, np.zeros(1, np.int64), prefix_length)
        logits = network.logits(collate([sample], [0], len(tokens), pad_id=0), path)[0]
        every = logits.double().log_softmax(-1)
        allowed = every.clone()
        if not log_probabilities:
            allowed[list(ends)] = -math.inf
        token = int(allowed.argmax())
        log_probabilities.append(float(every[token]))
        if token in ends:
            break
        tokens.append(token)
    mean = sum(log_probabilities) / max(1, len(log_probabilities))
    return Guess(tuple(tokens[len(prompt) :]), math.exp(mean))
