"""Extractive answers: long contexts cut into windows of tokens, and the likeliest span of each question."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from raptr_ds.finetuning.task import Example

OUTSIDE = -1
LONGEST_ANSWER = 30  # tokens
_CANDIDATES = 20  # best beginnings and ends that are combined, as in SQuAD's baselines


@dataclass(frozen=True)
class Window:
    """A part of a context beside its question, as tokens.

    offsets: (tokens, 2), where in the context a token begins and ends; OUTSIDE for tokens that are not of the context.
    """

    example: int
    inputs: dict[str, list[int]]
    offsets: np.ndarray


def windows_of(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, max_length: int, first: int = 0
) -> list[Window]:
    """Return the windows of questions; two neighbours share a quarter of `max_length` tokens.

    A question is cut to a quarter of `max_length`. first: the number of the first example.
    """
    share = max_length // 4
    cut = [_beginning(example.text.lstrip(), tokenizer, share) for example in examples]
    contexts = [example.pair or "" for example in examples]
    encoded = tokenizer(
        cut,
        contexts,
        truncation="only_second",
        max_length=max_length,
        stride=share,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    windows = []
    for index in range(len(encoded["input_ids"])):
        sequence = encoded.sequence_ids(index)
        offsets = np.array(encoded["offset_mapping"][index], dtype=np.int64)
        offsets[[part != 1 for part in sequence]] = OUTSIDE
        inputs = {name: encoded[name][index] for name in tokenizer.model_input_names if name in encoded}
        windows.append(Window(first + encoded["overflow_to_sample_mapping"][index], inputs, offsets))
    return windows


def _beginning(text: str, tokenizer: PreTrainedTokenizerFast, num_tokens: int) -> str:
    """Return the characters that `num_tokens` tokens hold whole: one character may be many (bytes, or normalized)."""

    def tokens(of: str) -> list[tuple[int, int]]:
        return tokenizer(of, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]

    while len(offsets := tokens(text)) > num_tokens:
        text = text[: min(offsets[num_tokens][0], len(text) - 1)]
    return text


def positions_of(window: Window, example: Example) -> tuple[int, int]:
    """Return the first and last token of the answer, or (0, 0), the first token, where the window does not hold it."""
    if not example.answers:
        return 0, 0
    answer = example.answers[0]
    begin = example.start + len(answer) - len(answer.lstrip())  # no token need hold the spaces around it
    end = begin + len(answer.strip())
    starts, ends = window.offsets.T
    inside = np.flatnonzero((starts != OUTSIDE) & (ends > begin) & (starts < end) & (ends > starts))
    in_context = np.flatnonzero(starts != OUTSIDE)
    if not len(inside) or ends[in_context].max() < end or starts[in_context].min() > begin:
        return 0, 0
    return int(inside[0]), int(inside[-1])


def best_answers(
    windows: Sequence[Window],
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    examples: Sequence[Example],
    may_be_empty: bool,
    longest: int = LONGEST_ANSWER,
) -> list[str]:
    """Return the text of the likeliest span of each example: the sum of its first and last token's logits decides.

    may_be_empty: an empty text where the first token, which stands for no answer, is likelier than every span in the
    window where it is least likely.
    Shapes: logits (windows, tokens); what is beyond a window's tokens is not looked at.
    """
    best: list[tuple[float, str]] = [(-np.inf, "")] * len(examples)
    empty = np.full(len(examples), np.inf)
    for window, starts, ends in zip(windows, start_logits, end_logits, strict=True):
        index, offsets = window.example, window.offsets
        empty[index] = min(empty[index], starts[0] + ends[0])
        allowed = np.flatnonzero(offsets[:, 0] != OUTSIDE)
        if not len(allowed):
            continue
        firsts = allowed[np.argsort(-starts[allowed], kind="stable")[:_CANDIDATES]]
        lasts = allowed[np.argsort(-ends[allowed], kind="stable")[:_CANDIDATES]]
        scores = starts[firsts][:, None] + ends[lasts][None]
        lengths = lasts[None] - firsts[:, None] + 1
        scores = np.where((lengths >= 1) & (lengths <= longest), scores, -np.inf)
        row, column = np.unravel_index(scores.argmax(), scores.shape)
        if scores[row, column] > best[index][0]:
            begin, end = offsets[firsts[row], 0], offsets[lasts[column], 1]
            best[index] = float(scores[row, column]), (examples[index].pair or "")[begin:end].strip()
    return ["" if may_be_empty and empty[i] >= score else text for i, (score, text) in enumerate(best)]
