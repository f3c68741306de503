"""Random spans of a text: exact counts, random places."""

import numpy as np


def count_spans(num_tokens: int, rate: float, mean_span: float) -> tuple[int, int]:
    """Return (noise tokens, spans) for a text: round(num_tokens rate) tokens in round(noise / mean_span) spans.

    At least one of each, and at least as many tokens stay as there are spans, since one stays before each.
    num_tokens >= 2.
    """
    num_noise = min(max(round(num_tokens * rate), 1), num_tokens - 1)
    num_spans = max(round(num_noise / mean_span), 1)
    return num_noise, min(num_spans, num_noise, num_tokens - num_noise)


def random_segments(num_items: int, num_segments: int, rng: np.random.Generator) -> np.ndarray:
    """Return the lengths (num_segments,) of a uniformly random cut of num_items into that many parts, none empty."""
    cuts = np.sort(rng.permutation(num_items - 1)[: num_segments - 1]) + 1
    return np.diff(cuts, prepend=0, append=num_items)


def random_spans(
    num_tokens: int, rate: float, mean_span: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Choose spans of a text, as (starts, lengths), each (num_spans,) in order.

    The text begins with a token that stays, a token stays between any two spans, and the last span ends the text.
    Source: random_spans_noise_mask of T5 (Raffel et al. 2020, section 3.1.4), from its description.
    """
    num_noise, num_spans = count_spans(num_tokens, rate, mean_span)
    lengths = random_segments(num_noise, num_spans, rng)
    gaps = random_segments(num_tokens - num_noise, num_spans, rng)
    starts = np.cumsum(gaps + lengths) - lengths
    return starts, lengths
