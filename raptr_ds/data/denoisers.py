"""UL2's objective: a mixture of denoisers, laid out for a decoder that sees its inputs in both directions.

A denoiser (raptr_ds.config.sections.Denoiser) hides a part of a text of L tokens. span: round(rate L) of them, in spans
of mean_span tokens on average, are replaced by sentinels and follow after the inputs, each behind its sentinel, with
[EOS] at the end. prefix: the last round(rate L) tokens are the target. causal: every token is predicted from those
before it, except the first of all.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import partial

import numpy as np

from raptr_ds.config.sections import Denoiser, ObjectiveSection
from raptr_ds.data.batch import Sample
from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.errors import ConfigError

# Source: Tay et al. 2022, section 3.1.2 and table 1; S corrupts one suffix span of a quarter of the text.
UL2 = (
    Denoiser(name="R1", kind="span", mean_span=3, rate=0.15, mode="[NLU]"),
    Denoiser(name="R2", kind="span", mean_span=8, rate=0.15, mode="[NLU]"),
    Denoiser(name="S", kind="prefix", rate=0.25, mode="[S2S]"),
    Denoiser(name="X1", kind="span", mean_span=3, rate=0.5, mode="[NLG]"),
    Denoiser(name="X2", kind="span", mean_span=8, rate=0.5, mode="[NLG]"),
    Denoiser(name="X3", kind="span", mean_span=64, rate=0.15, mode="[NLG]"),
    Denoiser(name="X4", kind="span", mean_span=64, rate=0.5, mode="[NLG]"),
)
# The mixture of follow-up work on decoder-only UL2; which mode token stands for which is our choice.
CAUSAL_PREFIX_SPAN = (
    Denoiser(name="causal", kind="causal", mode="[NLG]", weight=0.6),
    Denoiser(name="prefix", kind="prefix", rate=0.25, mode="[S2S]", weight=0.2),
    Denoiser(name="span", kind="span", mean_span=3, rate=0.15, mode="[NLU]", weight=0.2),
)
PRESETS = {"ul2": UL2, "causal_prefix_span": CAUSAL_PREFIX_SPAN}


def denoisers_of(objective: ObjectiveSection) -> tuple[Denoiser, ...]:
    """Return the denoisers that a run names, by preset or one by one."""
    choice = objective.denoisers
    return PRESETS[choice] if isinstance(choice, str) else choice


def num_spans(denoiser: Denoiser, text_length: int) -> int:
    """Return the number of sentinels that a text of this many tokens takes."""
    return count_spans(denoiser, text_length)[1] if denoiser.kind == "span" else 0


def num_predictions(denoiser: Denoiser, text_length: int) -> int:
    """Return the number of predicted tokens of the sample made from a text (of at least two tokens)."""
    if denoiser.kind == "causal":
        return text_length - (denoiser.mode is None)
    if denoiser.kind == "prefix":
        return _num_hidden(denoiser, text_length)
    return sum(count_spans(denoiser, text_length)) + 1


def total_length(denoiser: Denoiser, text_length: int) -> int:
    """Return the length of the sample made from a text: mode token, inputs and targets."""
    overhead = 2 * num_spans(denoiser, text_length) + 1 if denoiser.kind == "span" else 0
    return (denoiser.mode is not None) + text_length + overhead


def longest_text(denoiser: Denoiser, seq_length: int) -> int:
    """Return the length of the longest text whose sample fits into `seq_length` tokens.

    At most three positions then stay empty: what one more span and token would take.
    Raises: ConfigError if not even two tokens of text fit.
    """
    if total_length(denoiser, 2) > seq_length:
        raise ConfigError(
            f"raptr_ds.model.seq_length={seq_length} has no room for denoiser {denoiser.name!r}: two tokens of text "
            f"already take {total_length(denoiser, 2)}. Use a longer seq_length."
        )
    lengths = range(2, seq_length + 1)  # total_length never decreases as the text grows
    return lengths[bisect_right(lengths, seq_length, key=partial(total_length, denoiser)) - 1]


def mean_predictions(seq_length: int, denoisers: Sequence[Denoiser]) -> float:
    """Return the expected number of predicted tokens of a sample, its denoiser drawn by weight."""
    counts = [num_predictions(denoiser, longest_text(denoiser, seq_length)) for denoiser in denoisers]
    weights = [denoiser.weight for denoiser in denoisers]
    return sum(count * weight for count, weight in zip(counts, weights, strict=True)) / sum(weights)


def count_spans(denoiser: Denoiser, text_length: int) -> tuple[int, int]:
    """Return (hidden tokens, spans) for a text of at least two tokens: round(hidden / mean_span) spans.

    At least one, and at most as many as tokens that stay, since one stays before each span.
    """
    assert denoiser.mean_span is not None
    num_hidden = _num_hidden(denoiser, text_length)
    return num_hidden, min(max(round(num_hidden / denoiser.mean_span), 1), num_hidden, text_length - num_hidden)


def _num_hidden(denoiser: Denoiser, text_length: int) -> int:
    """Return round(text_length rate), but at least one token, and not all."""
    assert denoiser.rate is not None
    return min(max(round(text_length * denoiser.rate), 1), text_length - 1)


class MixtureOfDenoisers:
    """Makes samples [mode] inputs | targets: the inputs are the prefix, and each target is predicted one place before.

    Each sample draws its denoiser by weight. Denoisers need texts of different lengths to fill the same seq_length; the
    shorter ones read a random stretch of the window.
    """

    def __init__(self, tokenizer: Tokenizer, seq_length: int, denoisers: Sequence[Denoiser]) -> None:
        """Compute the length of each denoiser's text.

        Raises: ConfigError if seq_length is too short, DataError if the tokenizer has too few sentinels.
        """
        self.denoisers = tuple(denoisers)
        self._lengths = [longest_text(denoiser, seq_length) for denoiser in denoisers]
        self.window = max(self._lengths)
        self.smallest_room = max(total_length(denoiser, 2) for denoiser in denoisers)
        tokenizer.require_sentinels(
            max(map(num_spans, denoisers, self._lengths)),
            f"this mixture of denoisers at raptr_ds.model.seq_length={seq_length}",
        )
        self._tokenizer = tokenizer
        weights = np.array([denoiser.weight for denoiser in denoisers], np.float64)
        self._cumulative = np.cumsum(weights / weights.sum())[:-1]

    def sample(self, text: np.ndarray, rng: np.random.Generator, room: int | None = None) -> Sample:
        """Draw a denoiser and corrupt a stretch of `text` (at most `window` tokens, int64) with it.

        room: tokens that the sample may take, at least `smallest_room`; by default seq_length.
        """
        choice = int(np.searchsorted(self._cumulative, rng.random(), side="right"))
        fits = self._lengths[choice] if room is None else longest_text(self.denoisers[choice], room)
        length = min(fits, len(text))
        start = int(rng.integers(len(text) - length + 1))
        return self.corrupt(self.denoisers[choice], text[start : start + length], rng)

    def corrupt(self, denoiser: Denoiser, text: np.ndarray, rng: np.random.Generator) -> Sample:
        """Corrupt all of `text` (at least two tokens, int64) with one denoiser."""
        mode = np.array([] if denoiser.mode is None else [self._tokenizer.mode_ids[denoiser.mode]], np.int64)
        if denoiser.kind == "causal":
            return _with_targets(np.concatenate([mode, text]), 1)
        if denoiser.kind == "prefix":
            prefix_length = len(mode) + len(text) - _num_hidden(denoiser, len(text))
            return _with_targets(np.concatenate([mode, text]), prefix_length)
        starts, lengths = random_spans(len(text), *count_spans(denoiser, len(text)), rng)
        inputs, targets = replace_spans(text, starts, lengths, self._tokenizer.sentinel_ids)
        tokens = np.concatenate([mode, inputs, targets, [self._tokenizer.eos_id]])
        return _with_targets(tokens, len(mode) + len(inputs))


def replace_spans(
    text: np.ndarray, starts: np.ndarray, lengths: np.ndarray, sentinels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return (inputs, targets): the text with a sentinel in place of each span, and each span behind its sentinel.

    Shapes: text (T,), starts and lengths (n,) in order without overlap; inputs (T - noise + n,), targets (noise + n,).
    """
    num_spans = len(starts)
    marks = sentinels[:num_spans]
    is_noise = np.zeros(len(text) + 1, np.int64)
    is_noise[starts] += 1
    is_noise[starts + lengths] -= 1
    noisy = np.cumsum(is_noise[:-1]).astype(bool)
    kept = text[~noisy]
    noise_before = np.cumsum(lengths) - lengths
    inputs = np.insert(kept, starts - noise_before, marks)
    targets = np.insert(text[noisy], noise_before, marks)
    return inputs, targets


def _with_targets(tokens: np.ndarray, prefix_length: int) -> Sample:
    """Return the sample in which every token from `prefix_length` on is predicted at the position before it."""
    positions = np.arange(prefix_length - 1, len(tokens) - 1)
    return Sample(tokens, positions, tokens[prefix_length:], prefix_length)


def random_segments(num_items: int, num_segments: int, rng: np.random.Generator) -> np.ndarray:
    """Return the lengths (num_segments,) of a uniformly random cut of num_items into that many parts, none empty."""
    cuts = np.sort(rng.permutation(num_items - 1)[: num_segments - 1]) + 1
    return np.diff(cuts, prepend=0, append=num_items)


def random_spans(
    num_tokens: int, num_noise: int, num_spans: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Choose spans of a text that hold num_noise tokens, as (starts, lengths), each (num_spans,) in order.

    The text begins with a token that stays, a token stays between any two spans, and the last span ends the text.
    Source: random_spans_noise_mask of T5 (Raffel et al. 2020, section 3.1.4), from its description.
    """
    lengths = random_segments(num_noise, num_spans, rng)
    gaps = random_segments(num_tokens - num_noise, num_spans, rng)
    starts = np.cumsum(gaps + lengths) - lengths
    return starts, lengths
