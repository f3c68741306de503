"""UL2's objective: a mixture of denoisers, laid out for a decoder that sees its inputs in both directions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from raptr_ds.data.sample import Sample
from raptr_ds.data.spans import count_spans, random_spans
from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.errors import ConfigError


class DenoiserSection(Protocol):
    """A denoiser as a run file gives it; see Denoiser for the meaning."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> Literal["span", "prefix", "causal"]: ...
    @property
    def mean_span(self) -> float | None: ...
    @property
    def rate(self) -> float | None: ...
    @property
    def mode(self) -> str | None: ...
    @property
    def weight(self) -> float: ...


@dataclass(frozen=True)
class Denoiser:
    """One way to hide a part of a text.

    span: round(rate L) of L tokens, in spans of mean_span tokens on average, are replaced by sentinels and come back
    after the inputs, each behind its sentinel, with [EOS] at the end. prefix: the last round(rate L) tokens are the
    target, as they stand. causal: every token is predicted from those before it, but for the first of all.
    mode: the token in front that names the task, or None. weight: share in the mixture, relative to the others.
    """

    name: str
    kind: Literal["span", "prefix", "causal"]
    mean_span: float | None = None
    rate: float | None = None
    mode: str | None = None
    weight: float = 1.0

    def num_spans(self, text_length: int) -> int:
        """Return the number of sentinels that a text of this many tokens takes."""
        if self.kind != "span":
            return 0
        assert self.rate is not None
        assert self.mean_span is not None
        return count_spans(text_length, self.rate, self.mean_span)[1]

    def total_length(self, text_length: int) -> int:
        """Return the length of the sample made from a text: mode token, inputs and targets."""
        overhead = 2 * self.num_spans(text_length) + 1 if self.kind == "span" else 0
        return (self.mode is not None) + text_length + overhead

    def num_predictions(self, text_length: int) -> int:
        """Return the number of predicted tokens of the sample made from a text (of at least two tokens)."""
        if self.kind == "causal":
            return text_length - (self.mode is None)
        assert self.rate is not None
        if self.kind == "prefix":
            return min(max(round(text_length * self.rate), 1), text_length - 1)
        assert self.mean_span is not None
        num_noise, num_spans = count_spans(text_length, self.rate, self.mean_span)
        return num_noise + num_spans + 1

    def text_length(self, seq_length: int) -> int:
        """Return the length of the longest text whose sample fits into `seq_length` tokens.

        What a sample then leaves empty is at most the three tokens that one more span and token would take.
        Raises: ConfigError if not even two tokens of text fit.
        """
        # total_length never falls as the text grows, so the longest that fits is found by halving.
        low, high = 2, seq_length
        if self.total_length(low) > seq_length:
            raise ConfigError(
                f"raptr_ds.model.seq_length={seq_length} has no room for denoiser {self.name!r}: two tokens of text "
                "already "
                f"take {self.total_length(low)}. Use a longer seq_length."
            )
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.total_length(middle) <= seq_length else (low, middle - 1)
        return low


# Source: Tay et al. 2022, section 3.1.2 and table 1; S corrupts one suffix span of a quarter of the text.
UL2 = (
    Denoiser("R1", "span", 3, 0.15, "[NLU]"),
    Denoiser("R2", "span", 8, 0.15, "[NLU]"),
    Denoiser("S", "prefix", None, 0.25, "[S2S]"),
    Denoiser("X1", "span", 3, 0.5, "[NLG]"),
    Denoiser("X2", "span", 8, 0.5, "[NLG]"),
    Denoiser("X3", "span", 64, 0.15, "[NLG]"),
    Denoiser("X4", "span", 64, 0.5, "[NLG]"),
)
# The mixture of follow-up work on decoder-only UL2; which mode token stands for which is our choice.
CAUSAL_PREFIX_SPAN = (
    Denoiser("causal", "causal", None, None, "[NLG]", 0.6),
    Denoiser("prefix", "prefix", None, 0.25, "[S2S]", 0.2),
    Denoiser("span", "span", 3, 0.15, "[NLU]", 0.2),
)
PRESETS = {"ul2": UL2, "causal_prefix_span": CAUSAL_PREFIX_SPAN}


def resolve_denoisers(choice: str | Sequence[DenoiserSection]) -> tuple[Denoiser, ...]:
    """Return a preset by name, or a list of one's own, checked.

    Raises: ConfigError for an unknown preset, an empty list or a denoiser that lacks what its kind needs.
    """
    if isinstance(choice, str):
        if choice not in PRESETS:
            raise ConfigError(
                f"raptr_ds.objective.denoisers={choice!r} is unknown; known are {', '.join(PRESETS)}, or a list."
            )
        return PRESETS[choice]
    if not choice:
        raise ConfigError("raptr_ds.objective.denoisers is an empty list. Name a preset or give at least one denoiser.")
    denoisers = tuple(Denoiser(d.name, d.kind, d.mean_span, d.rate, d.mode, d.weight) for d in choice)
    for denoiser in denoisers:
        needed = {"span": ("mean_span", "rate"), "prefix": ("rate",), "causal": ()}[denoiser.kind]
        if missing := [key for key in needed if getattr(denoiser, key) is None]:
            raise ConfigError(
                f"denoiser {denoiser.name!r} in raptr_ds.objective.denoisers is of kind {denoiser.kind} and lacks "
                f"{' and '.join(missing)}. Give a value, for instance rate 0.15, mean_span 3."
            )
    return denoisers


def required_sentinels(seq_length: int, denoisers: Sequence[Denoiser]) -> int:
    """Return the most sentinels that one sample can take."""
    return max(denoiser.num_spans(denoiser.text_length(seq_length)) for denoiser in denoisers)


def mean_predictions(seq_length: int, denoisers: Sequence[Denoiser]) -> float:
    """Return the expected number of predicted tokens of a sample, its denoiser drawn by weight."""
    counts = [denoiser.num_predictions(denoiser.text_length(seq_length)) for denoiser in denoisers]
    weights = [denoiser.weight for denoiser in denoisers]
    return sum(count * weight for count, weight in zip(counts, weights, strict=True)) / sum(weights)


class MixtureOfDenoisers:
    """Makes samples [mode] inputs | targets; the inputs are the prefix, every target token is predicted from before it.

    Each sample draws its denoiser by weight. Denoisers take texts of different lengths to fill the same seq_length; the
    shorter ones read a random stretch of the window.
    """

    def __init__(self, tokenizer: Tokenizer, seq_length: int, denoisers: Sequence[Denoiser]) -> None:
        """Work out the length of each denoiser's text.

        Raises: ConfigError if seq_length is too short, DataError if the tokenizer has too few sentinels.
        """
        self.denoisers = tuple(denoisers)
        self._lengths = [denoiser.text_length(seq_length) for denoiser in denoisers]
        self.window = max(self._lengths)
        self.smallest_room = max(denoiser.total_length(2) for denoiser in denoisers)
        tokenizer.require_sentinels(
            required_sentinels(seq_length, denoisers),
            f"this mixture of denoisers at raptr_ds.model.seq_length={seq_length}",
        )
        self._sentinels = tokenizer.sentinel_ids
        self._mode_ids = tokenizer.mode_ids
        self._eos_id = tokenizer.eos_id
        weights = np.array([denoiser.weight for denoiser in denoisers], np.float64)
        self._cumulative = np.cumsum(weights / weights.sum())[:-1]

    def sample(self, text: np.ndarray, rng: np.random.Generator, room: int | None = None) -> Sample:
        """Draw a denoiser and corrupt a stretch of `text` (at most `window` tokens, int64) with it.

        room: tokens that the sample may take, at least `smallest_room`; by default seq_length.
        """
        choice = int(np.searchsorted(self._cumulative, rng.random(), side="right"))
        fits = self._lengths[choice] if room is None else self.denoisers[choice].text_length(room)
        length = min(fits, len(text))
        start = int(rng.integers(len(text) - length + 1))
        return self.corrupt(self.denoisers[choice], text[start : start + length], rng)

    def corrupt(self, denoiser: Denoiser, text: np.ndarray, rng: np.random.Generator) -> Sample:
        """Corrupt all of `text` (at least two tokens, int64) with one denoiser."""
        mode = np.array([] if denoiser.mode is None else [self._mode_ids[denoiser.mode]], np.int64)
        if denoiser.kind == "causal":
            tokens = np.concatenate([mode, text])
            return _with_targets(tokens, 1)
        assert denoiser.rate is not None
        if denoiser.kind == "prefix":
            num_targets = min(max(round(len(text) * denoiser.rate), 1), len(text) - 1)
            tokens = np.concatenate([mode, text])
            return _with_targets(tokens, len(tokens) - num_targets)
        assert denoiser.mean_span is not None
        starts, lengths = random_spans(len(text), denoiser.rate, denoiser.mean_span, rng)
        inputs, targets = replace_spans(text, starts, lengths, self._sentinels)
        tokens = np.concatenate([mode, inputs, targets, [self._eos_id]])
        return _with_targets(tokens, len(mode) + len(inputs))


def replace_spans(
    text: np.ndarray, starts: np.ndarray, lengths: np.ndarray, sentinels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return (inputs, targets): each span replaced by its sentinel, and each span behind its sentinel.

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
