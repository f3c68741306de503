"""Masked language modelling: exact counts, the shares of each fate, specials left alone, whole words."""

import numpy as np
import pytest

from raptr_ds.data.masked_lm import MaskedLM
from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.errors import ConfigError


@pytest.fixture
def text(tokenizer: Tokenizer) -> np.ndarray:
    rng = np.random.default_rng(0)
    text = rng.choice(tokenizer.text_ids, 200)
    text[[50, 51, 120]] = tokenizer.eos_id
    return text


@pytest.mark.parametrize("rate", [0.15, 0.4, 0.001])
@pytest.mark.parametrize("length", [1, 2, 37, 200])
def test_exactly_the_rate_of_text_tokens_is_predicted(
    tokenizer: Tokenizer, text: np.ndarray, rate: float, length: int
) -> None:
    objective = MaskedLM(tokenizer, 202, rate, False)
    original = text[:length]
    sample = objective.sample(original.copy(), np.random.default_rng(1))
    num_text = int((original != tokenizer.eos_id).sum())
    assert len(sample.positions) == len(sample.targets) == max(1, round(num_text * rate))
    assert len(np.unique(sample.positions)) == len(sample.positions)
    assert (np.diff(sample.positions) > 0).all()
    assert sample.tokens[[0, -1]].tolist() == [tokenizer.cls_id, tokenizer.sep_id]
    assert sample.prefix_length == len(sample.tokens) == length + 2
    restored = sample.tokens.copy()
    restored[sample.positions] = sample.targets
    assert restored[1:-1].tolist() == original.tolist()
    assert not tokenizer.is_special[sample.targets].any()


def test_fates_are_80_10_10_and_random_tokens_are_text(tokenizer: Tokenizer, text: np.ndarray) -> None:
    objective = MaskedLM(tokenizer, 202, 0.5, False)
    rng = np.random.default_rng(2)
    seen, wanted = [], []
    for _ in range(300):
        sample = objective.sample(text, rng)
        seen.append(sample.tokens[sample.positions])
        wanted.append(sample.targets)
    found, targets = np.concatenate(seen), np.concatenate(wanted)
    masked, kept = found == tokenizer.mask_id, found == targets
    replaced = found[~masked & ~kept]
    deviation = np.sqrt(0.25 / len(found))
    assert abs(masked.mean() - 0.8) < 5 * deviation
    assert abs(kept.mean() - 0.1) < 5 * deviation
    assert not tokenizer.is_special[replaced].any()
    assert len(np.unique(replaced)) > 0.9 * len(tokenizer.text_ids)


def test_every_position_is_chosen_equally_often(tokenizer: Tokenizer, text: np.ndarray) -> None:
    objective = MaskedLM(tokenizer, 202, 0.15, False)
    counts = np.zeros(202)
    rng = np.random.default_rng(3)
    for _ in range(2000):
        counts[objective.sample(text, rng).positions] += 1
    special = [0, 201, 51, 52, 121]
    assert (counts[special] == 0).all()
    rest = np.delete(counts, special)
    assert rest.std() < 1.3 * np.sqrt(2000 * 0.15 * 0.85)


def test_whole_words_are_predicted_whole_and_within_the_budget(tokenizer: Tokenizer) -> None:
    text = tokenizer.encode("some unbelievably incomprehensible words follow one another\nand again " * 12).astype(
        np.int64
    )
    text[20] = tokenizer.eos_id
    objective = MaskedLM(tokenizer, len(text) + 2, 0.15, True)
    tokens = np.concatenate([[tokenizer.cls_id], text, [tokenizer.sep_id]])
    word = np.cumsum(tokenizer.starts_word[tokens] | np.roll(tokens == tokenizer.eos_id, 1))
    budget = round((len(text) - 1) * 0.15)
    sizes = []
    for seed in range(50):
        sample = objective.sample(text, np.random.default_rng(seed))
        chosen = np.isin(word, word[sample.positions]) & (tokens != tokenizer.eos_id)
        assert np.flatnonzero(chosen).tolist() == sample.positions.tolist()
        assert len(sample.positions) <= budget
        sizes.append(len(sample.positions))
    assert np.mean(sizes) > 0.9 * budget


def test_a_text_of_one_long_word_is_still_predicted(tokenizer: Tokenizer) -> None:
    text = tokenizer.encode("qzxjwvqzxjwv").astype(np.int64)
    assert len(text) > 5
    sample = MaskedLM(tokenizer, 50, 0.15, True).sample(text, np.random.default_rng(0))
    assert len(sample.positions) == len(text)


def test_only_special_tokens_give_nothing_to_predict(tokenizer: Tokenizer) -> None:
    for whole_word in (False, True):
        text = np.full(4, tokenizer.eos_id, np.int64)
        sample = MaskedLM(tokenizer, 8, 0.15, whole_word).sample(text, np.random.default_rng(0))
        assert len(sample.positions) == len(sample.targets) == 0


def test_no_room_for_text(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="seq_length=3 has no room"):
        MaskedLM(tokenizer, 3, 0.15, False)
