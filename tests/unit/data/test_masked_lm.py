"""Masked language modelling: exact counts, the shares of each fate, specials left alone, whole words."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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


# Words that no space ends: none may take the whole sample.
CHINESE = "天地玄黄宇宙洪荒日月盈昃"
LONG_WORDS = {
    "chinese": CHINESE * 9,
    "chinese with punctuation": f"{CHINESE}\u3002" * 5,
    "japanese": "吾輩は猫である\u3002名前はまだ無い\u3002\nカタカナ" * 4,
    "thai": "กขคงจฉชซฌญฎฏ" * 9,
    "korean": "안녕하세요 세계" * 9,
    "identifier": "a_very_long_identifier_that_never_ends_" * 4,
    "url": "https://example.org/path/to/page?first=1&second=two%20words#end" * 2,
    "base64": "TWFueSBoYW5kcyBtYWtlIGxpZ2h0IHdvcmsu" * 4,
    "one word": "qzxjwvqzxjwv",
    "mixed": f"see https://example.org/a?b=c or {CHINESE} and a b c " * 3,
    "a long word and a short one": "a " + CHINESE * 8,
}


@pytest.mark.parametrize("text", LONG_WORDS.values(), ids=LONG_WORDS)
@pytest.mark.parametrize("rate", [0.05, 0.15, 0.5])
def test_a_word_without_end_keeps_to_the_budget(tokenizer: Tokenizer, text: str, rate: float) -> None:
    ids = tokenizer.encode(text)[:254].astype(np.int64)
    objective = MaskedLM(tokenizer, 256, rate, True)
    budget = max(1, round(len(ids) * rate))
    counts = np.zeros(len(ids) + 2)
    for seed in range(200):
        positions = objective.sample(ids, np.random.default_rng(seed)).positions
        assert 0 < len(positions) <= budget
        counts[positions] += 1
    assert counts.sum() > 0.75 * 200 * budget  # the rest is what words at the end of the order are too long for
    assert (counts[1:-1] > 0).all() or rate < 0.15  # no word is so long that it is never predicted


def brute_force(lengths: list[int], budget: int, order: list[int]) -> list[int]:
    """Return the positions that the rule gives, word by word; order: of the words after long ones are cut."""
    words, position = [], 0
    for length in lengths:
        parts = [length] if length <= budget else [1] * length
        for part in parts:
            words.append(list(range(position, position + part)))
            position += part
    chosen: list[int] = []
    for word in order:
        if len(chosen) + len(words[word]) <= budget:
            chosen += words[word]
    return sorted(chosen)


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=30), rate=st.floats(0.001, 0.999), seed=st.integers(0, 99)
)
def test_words_of_any_length(tokenizer: Tokenizer, lengths: list[int], rate: float, seed: int) -> None:
    """Against the rule written as a loop; where all words fit this is also what the rule without cutting gives."""
    begin, inside = (
        np.flatnonzero(tokenizer.starts_word[tokenizer.text_ids] == starts)[-1] for starts in (True, False)
    )
    text = np.concatenate([tokenizer.text_ids[[begin, *[inside] * (length - 1)]] for length in lengths])
    sample = MaskedLM(tokenizer, len(text) + 3, rate, True).sample(text, np.random.default_rng(seed))
    budget = max(1, round(len(text) * rate))
    num_words = sum(length if length > budget else 1 for length in lengths)
    order = np.random.default_rng(seed).permutation(num_words).tolist()
    assert (sample.positions - 1).tolist() == brute_force(lengths, budget, order)


@given(data=st.data(), rate=st.floats(0.001, 0.999), whole_word=st.booleans(), seed=st.integers(0, 99))
def test_any_ids_keep_to_the_budget(
    tokenizer: Tokenizer, data: st.DataObject, rate: float, whole_word: bool, seed: int
) -> None:
    ids = st.sampled_from(range(tokenizer.vocab_size))
    text = np.array(data.draw(st.lists(ids, min_size=1, max_size=80)), np.int64)
    sample = MaskedLM(tokenizer, len(text) + 3, rate, whole_word).sample(text.copy(), np.random.default_rng(seed))
    num_text = int((~tokenizer.is_special[text]).sum())
    budget = max(1, round(num_text * rate)) if num_text else 0
    assert min(1, num_text) <= len(sample.positions) <= budget
    assert (np.diff(sample.positions) > 0).all()
    original = np.concatenate([[tokenizer.cls_id], text, [tokenizer.sep_id]])
    assert sample.targets.tolist() == original[sample.positions].tolist()
    assert not tokenizer.is_special[sample.targets].any()
    sample.tokens[sample.positions] = sample.targets
    assert sample.tokens.tolist() == original.tolist()


def test_only_special_tokens_give_nothing_to_predict(tokenizer: Tokenizer) -> None:
    for whole_word in (False, True):
        text = np.full(4, tokenizer.eos_id, np.int64)
        sample = MaskedLM(tokenizer, 8, 0.15, whole_word).sample(text, np.random.default_rng(0))
        assert len(sample.positions) == len(sample.targets) == 0


def test_no_room_for_text(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="seq_length=3 has no room"):
        MaskedLM(tokenizer, 3, 0.15, False)
