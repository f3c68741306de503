"""Denoisers: the text can be put together again, counts and lengths are exact, sentinels suffice."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raptr_ds.config.sections import Denoiser, ObjectiveSection
from raptr_ds.data.batch import Sample
from raptr_ds.data.denoisers import (
    CAUSAL_PREFIX_SPAN,
    UL2,
    MixtureOfDenoisers,
    count_spans,
    denoisers_of,
    longest_text,
    num_predictions,
    num_spans,
    random_segments,
    random_spans,
    replace_spans,
    total_length,
)
from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.errors import ConfigError, DataError

ALL = (
    *UL2,
    *CAUSAL_PREFIX_SPAN,
    Denoiser(name="plain", kind="span", mean_span=3, rate=0.15),
    Denoiser(name="lm", kind="causal"),
    Denoiser(name="p", kind="prefix", rate=0.5),
)


def text_of(tokenizer: Tokenizer, length: int, seed: int = 0) -> np.ndarray:
    text = np.random.default_rng(seed).choice(tokenizer.text_ids, length)
    text[length // 2] = tokenizer.eos_id
    return text


def put_together(sample: Sample, denoiser: Denoiser, tokenizer: Tokenizer) -> list[int]:
    """Restore the text from inputs and targets alone, token by token: the oracle."""
    inputs, targets = sample.tokens[: sample.prefix_length].tolist(), sample.tokens[sample.prefix_length :].tolist()
    if denoiser.mode is not None:
        assert inputs.pop(0) == tokenizer.mode_ids[denoiser.mode]
    if denoiser.kind != "span":
        return inputs + targets
    assert targets.pop() == tokenizer.eos_id
    sentinels = tokenizer.sentinel_ids.tolist()
    spans: dict[int, list[int]] = {}
    current: list[int] = []
    for token in targets:
        if token in sentinels:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    assert list(spans) == sentinels[: len(spans)]
    return [token for place in inputs for token in (spans.pop(place) if place in sentinels else [place])]


@pytest.mark.parametrize("denoiser", ALL, ids=lambda denoiser: denoiser.name)
@pytest.mark.parametrize("seq_length", [9, 31, 64, 127, 128, 257])
def test_the_text_can_be_put_together_again(tokenizer: Tokenizer, denoiser: Denoiser, seq_length: int) -> None:
    objective = MixtureOfDenoisers(tokenizer, seq_length, [denoiser])
    for seed in range(5):
        text = text_of(tokenizer, objective.window, seed)
        sample = objective.sample(text, np.random.default_rng(seed))
        assert put_together(sample, denoiser, tokenizer) == text.tolist()
        assert seq_length - 3 < len(sample.tokens) <= seq_length
        assert sample.positions.tolist() == list(range(sample.prefix_length - 1, len(sample.tokens) - 1))
        assert sample.targets.tolist() == sample.tokens[sample.positions + 1].tolist()
        assert not (sample.tokens == tokenizer.pad_id).any()


@pytest.mark.parametrize("denoiser", ALL, ids=lambda denoiser: denoiser.name)
def test_the_text_is_the_longest_that_fits(denoiser: Denoiser) -> None:
    for seq_length in [*range(8, 200), 511, 512, 1024]:
        length = longest_text(denoiser, seq_length)
        assert total_length(denoiser, length) <= seq_length < total_length(denoiser, length + 1)


def test_a_causal_sample_predicts_all_but_the_first_token(tokenizer: Tokenizer) -> None:
    objective = MixtureOfDenoisers(tokenizer, 32, [CAUSAL_PREFIX_SPAN[0]])
    sample = objective.sample(text_of(tokenizer, 31), np.random.default_rng(0))
    assert (sample.prefix_length, len(sample.tokens), len(sample.targets)) == (1, 32, 31)


def test_the_suffix_of_a_prefix_sample_is_a_quarter(tokenizer: Tokenizer) -> None:
    objective = MixtureOfDenoisers(tokenizer, 129, [UL2[2]])
    sample = objective.sample(text_of(tokenizer, 128), np.random.default_rng(0))
    assert (sample.prefix_length, len(sample.targets)) == (97, 32)


def spans(rate: float, mean_span: float) -> Denoiser:
    return Denoiser(name="spans", kind="span", rate=rate, mean_span=mean_span)


def test_counts_of_the_table() -> None:
    assert count_spans(spans(0.5, 3), 1024) == (512, 171)
    assert count_spans(spans(0.15, 3), 512) == (77, 26)
    assert count_spans(spans(0.15, 64), 100) == (15, 1)
    assert count_spans(spans(0.15, 3), 2) == (1, 1)
    assert count_spans(spans(0.9, 1), 4) == (3, 1)


@pytest.mark.parametrize("num_tokens", [2, 3, 7, 63, 64, 101, 511])
@pytest.mark.parametrize(("rate", "mean_span"), [(0.15, 3), (0.5, 3), (0.5, 64), (0.9, 1.5)])
def test_spans_have_exact_counts_and_do_not_touch(num_tokens: int, rate: float, mean_span: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        num_noise, num_spans = count_spans(spans(rate, mean_span), num_tokens)
        starts, lengths = random_spans(num_tokens, num_noise, num_spans, rng)
        assert (len(starts), int(lengths.sum())) == (num_spans, num_noise)
        assert starts[0] >= 1
        assert (lengths >= 1).all()
        assert (starts[1:] > (starts + lengths)[:-1]).all()
        assert starts[-1] + lengths[-1] == num_tokens


@given(
    num_tokens=st.integers(2, 700), rate=st.floats(0.001, 0.999), mean_span=st.floats(1, 100), seed=st.integers(0, 99)
)
def test_spans_of_any_text_keep_to_the_budget(num_tokens: int, rate: float, mean_span: float, seed: int) -> None:
    counts = count_spans(spans(rate, mean_span), num_tokens)
    starts, lengths = random_spans(num_tokens, *counts, np.random.default_rng(seed))
    noisy = [place for start, length in zip(starts, lengths, strict=True) for place in range(start, start + length)]
    assert len(noisy) == len(set(noisy)) == min(max(1, round(num_tokens * rate)), num_tokens - 1)
    assert 1 <= len(starts) <= max(1, round(len(noisy) / mean_span))
    assert 0 < min(noisy) <= max(noisy) < num_tokens
    text, sentinels = np.arange(num_tokens), num_tokens + np.arange(len(starts))
    inputs, targets = replace_spans(text, starts, lengths, sentinels)
    kept, hidden = inputs[inputs < num_tokens].tolist(), targets[targets < num_tokens].tolist()
    assert hidden == noisy
    assert kept == sorted(set(range(num_tokens)) - set(noisy))
    assert inputs[inputs >= num_tokens].tolist() == targets[targets >= num_tokens].tolist() == sentinels.tolist()


def test_segments_are_uniform_over_all_cuts() -> None:
    """5 items in 3 segments: 6 cuts, each as frequent as the others."""
    rng = np.random.default_rng(0)
    found: dict[tuple[int, ...], int] = {}
    for _ in range(6000):
        cut = tuple(random_segments(5, 3, rng).tolist())
        found[cut] = found.get(cut, 0) + 1
    assert len(found) == 6
    assert all(abs(count - 1000) < 5 * np.sqrt(1000 * 5 / 6) for count in found.values())


def test_every_place_is_noise_about_as_often() -> None:
    """But for the ends, which the layout fixes: the first token stays and the last is noise."""
    rng = np.random.default_rng(0)
    counts = np.zeros(100)
    for _ in range(4000):
        starts, lengths = random_spans(100, *count_spans(spans(0.5, 3), 100), rng)
        for start, length in zip(starts, lengths, strict=True):
            counts[start : start + length] += 1
    assert counts[0] == 0
    assert counts[-1] == 4000
    assert abs(counts[20:80] / 4000 - 0.5).max() < 0.06


def test_replacing_spans_by_hand() -> None:
    text, sentinels = np.arange(10), np.array([100, 101, 102])
    inputs, targets = replace_spans(text, np.array([1, 4, 7]), np.array([2, 1, 3]), sentinels)
    assert inputs.tolist() == [0, 100, 3, 101, 5, 6, 102]
    assert targets.tolist() == [100, 1, 2, 101, 4, 102, 7, 8, 9]


def test_denoisers_are_drawn_by_weight(tokenizer: Tokenizer) -> None:
    objective = MixtureOfDenoisers(tokenizer, 64, CAUSAL_PREFIX_SPAN)
    text = text_of(tokenizer, objective.window)
    rng = np.random.default_rng(0)
    modes = [int(objective.sample(text, rng).tokens[0]) for _ in range(5000)]
    for denoiser in CAUSAL_PREFIX_SPAN:
        assert denoiser.mode is not None
        share = modes.count(tokenizer.mode_ids[denoiser.mode]) / len(modes)
        assert abs(share - denoiser.weight) < 5 * np.sqrt(0.25 / len(modes))


def test_short_texts_still_work(tokenizer: Tokenizer) -> None:
    objective = MixtureOfDenoisers(tokenizer, 64, UL2)
    for length in (2, 3, 10):
        for denoiser in UL2:
            text = text_of(tokenizer, length)
            sample = objective.corrupt(denoiser, text, np.random.default_rng(0))
            assert len(sample.targets) == num_predictions(denoiser, length)
            assert put_together(sample, denoiser, tokenizer) == text.tolist()


def test_the_sentinel_budget_follows_from_seq_length(tokenizer: Tokenizer) -> None:
    assert max(num_spans(denoiser, longest_text(denoiser, 512)) for denoiser in UL2) == 64
    MixtureOfDenoisers(tokenizer, 512, UL2)
    MixtureOfDenoisers(tokenizer, 100_000, CAUSAL_PREFIX_SPAN[:2])  # takes none
    with pytest.raises(DataError, match=r"has 100 sentinels .*seq_length=1024 needs 128.*--sentinels 128"):
        MixtureOfDenoisers(tokenizer, 1024, UL2)


def test_presets_and_custom_lists() -> None:
    assert denoisers_of(ObjectiveSection()) == UL2
    assert denoisers_of(ObjectiveSection(denoisers="causal_prefix_span")) == CAUSAL_PREFIX_SPAN
    own = (Denoiser(name="mine", kind="span", mean_span=4.0, rate=0.3, weight=2.0),)
    assert denoisers_of(ObjectiveSection(denoisers=own)) == own


@pytest.mark.parametrize("denoiser", ALL, ids=lambda denoiser: denoiser.name)
def test_presets_keep_the_rule_for_custom_denoisers(denoiser: Denoiser) -> None:
    assert denoiser.problem is None


def test_no_room_for_a_span(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="seq_length=5 has no room for denoiser 'R1'"):
        MixtureOfDenoisers(tokenizer, 5, UL2)
