"""BERT's objective: hide some tokens of a text and predict them."""

import numpy as np

from raptr_ds.data.batch import Sample
from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.errors import ConfigError

MASKED_SHARE = 0.8
RANDOM_SHARE = 0.1


def num_masked(num_tokens: int, mask_rate: float) -> int:
    """Return how many of a sample's text tokens are predicted."""
    return max(1, round(num_tokens * mask_rate))


class MaskedLM:
    """Makes samples [CLS] text [SEP] of which exactly round(mask_rate * n) of the n text tokens are predicted.

    Of the predicted ones 80% become [MASK], 10% a random text token and 10% stay. Special tokens, including the ends of
    documents, are never predicted and never the random token.

    whole_word takes whole words in random order and skips those that no longer fit into the same number, so it may
    predict a few tokens less, never more. A word longer than the whole number would always be skipped: each of its
    tokens counts as a word, as each Chinese character does in BERT. Lines without spaces (Chinese, Japanese, Thai,
    URLs) are such words.
    Source: Devlin et al. 2019, section 3.1 and appendix A.1; whole words: google-research/bert, README, 2019-05-31.
    """

    def __init__(self, tokenizer: Tokenizer, seq_length: int, mask_rate: float, whole_word: bool) -> None:
        """Keep the tables of the tokenizer; seq_length in tokens, special ones included.

        Raises: ConfigError if seq_length has no room for text.
        """
        if seq_length < 4:
            raise ConfigError(
                f"raptr_ds.model.seq_length={seq_length} has no room for [CLS], text and [SEP]. Use 4 or more."
            )
        self.window = seq_length - 2
        self.smallest_room = 4
        self.mask_rate = mask_rate
        self.whole_word = whole_word
        self._ends = tokenizer.cls_id, tokenizer.sep_id
        self._mask_id = tokenizer.mask_id
        self._is_special = tokenizer.is_special
        self._starts_word = tokenizer.starts_word
        self._newline_id = tokenizer.newline_id
        self._text_ids = tokenizer.text_ids

    def sample(self, text: np.ndarray, rng: np.random.Generator, room: int | None = None) -> Sample:
        """Corrupt `text` (at most `window` tokens, int64), or the beginning that fits with its ends into `room`."""
        text = text if room is None else text[: room - 2]
        tokens = np.concatenate([[self._ends[0]], text, [self._ends[1]]]).astype(np.int64)
        candidates = np.flatnonzero(~self._is_special[tokens])
        if len(candidates) == 0:
            positions = candidates
        elif self.whole_word:
            positions = self._choose_words(tokens, candidates, rng)
        else:
            positions = np.sort(rng.permutation(candidates)[: num_masked(len(candidates), self.mask_rate)])
        targets = tokens[positions]
        fate = rng.random(len(positions))
        tokens[positions[fate < MASKED_SHARE]] = self._mask_id
        replaced = positions[(fate >= MASKED_SHARE) & (fate < MASKED_SHARE + RANDOM_SHARE)]
        tokens[replaced] = rng.choice(self._text_ids, len(replaced))
        return Sample(tokens, positions, targets, prefix_length=len(tokens))

    def _choose_words(self, tokens: np.ndarray, candidates: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return the positions of random whole words that fit the budget; longer words count token by token."""
        budget = num_masked(len(candidates), self.mask_rate)
        # Candidates that are not neighbours have a special token between them, so they are not one word.
        text = tokens[candidates]
        begins = self._starts_word[text]
        begins[0] = True
        begins[1:] |= (np.diff(candidates) > 1) | (text[:-1] == self._newline_id)
        sizes = np.diff(np.flatnonzero(begins), append=len(candidates))
        begins |= np.repeat(sizes > budget, sizes)
        starts = np.flatnonzero(begins)
        sizes = np.diff(starts, append=len(candidates))
        chosen: list[int] = []
        for word in rng.permutation(len(starts)).tolist():
            if sizes[word] <= budget:
                chosen.append(word)
                budget -= sizes[word]
                if budget == 0:
                    break
        places = np.concatenate([np.arange(starts[word], starts[word] + sizes[word]) for word in sorted(chosen)])
        return candidates[places]
