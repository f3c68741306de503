"""A trained model at a glance: held-out sentences that it fills in, and its loss with fewer layers."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from raptr_ds.config.sections import Denoiser, ObjectiveSection
from raptr_ds.data.denoisers import denoisers_of
from raptr_ds.depth.guesses import FilledText, continued_sentence, infilled_sentence, masked_sentence
from raptr_ds.depth.held_out import HeldOut
from raptr_ds.depth.network import Network
from raptr_ds.depth.removal import DepthRow, remove_greedily
from raptr_ds.depth.sentences import held_out_sentences, words_of
from raptr_ds.depth.source import ModelSource
from raptr_ds.rng import stream

SHOWN_DEPTHS = (Fraction(1), Fraction(3, 4), Fraction(1, 2))
_HIDDEN_SHARE = 8  # one word of so many is hidden, but two at least
_SHORT_WORD = 3  # letters: easy to guess, and says little


def shown_sentences(
    network: Network, source: ModelSource, held_out: HeldOut, number: int, seed: int = 0
) -> Iterator[FilledText]:
    """Yield held-out sentences with what the whole model fills in: BERT masked words, UL2 missing and following ones.

    Sentences and blanks are drawn by the seed.
    """
    tokenizer, path = source.tokenizer, source.path(tuple(range(source.num_layers)))
    is_bert = source.trained.model.architecture == "bert"
    most = source.trained.model.seq_length // (1 if is_bert else 2) - 3
    ways: list[Denoiser] = []
    if not is_bert:
        of_kind = {one.kind: one for one in reversed(denoisers_of(ObjectiveSection(**held_out.objective)))}
        follower = of_kind.get("prefix", of_kind.get("causal"))
        ways = [one for one in (of_kind.get("span"), follower) if one is not None]
    for index, text in enumerate(held_out_sentences(held_out, tokenizer, number, most, seed)):
        words = hidden_words(source, text, seed)
        way = ways[index % len(ways)] if ways else None
        if is_bert:
            places = [place for word in words for place in word]
            yield masked_sentence(network, path, tokenizer, text, places)
        elif way is not None and way.kind == "span":
            yield infilled_sentence(network, path, tokenizer, text, words, way)
        elif way is not None:
            yield continued_sentence(network, path, tokenizer, text, len(text) // 2, way)


def hidden_words(source: ModelSource, text: np.ndarray, seed: int) -> list[range]:
    """Return the places of the words to hide, in order, no two side by side.

    Words of one token and several letters are taken first, then those of the fewest tokens, punctuation last.
    """
    tokenizer = source.tokenizer
    words = words_of(tokenizer, text)[1:] or [range(len(text))]
    number = max(2, len(words) // _HIDDEN_SHARE)
    order = [words[index] for index in np.argsort(stream(seed, "hidden words", len(text)).random(len(words)))]
    texts = {word: tokenizer.decode(text[word.start : word.stop]) for word in order}
    order.sort(key=lambda word: (not texts[word].isalpha(), len(word), len(texts[word]) <= _SHORT_WORD))
    chosen: list[range] = []
    for word in order:
        if len(chosen) < number and all(word.stop < other.start or other.stop < word.start for other in chosen):
            chosen.append(word)
    return sorted(chosen, key=lambda word: word.start)


def shown_depths(network: Network, source: ModelSource, held_out: HeldOut) -> list[tuple[Fraction, DepthRow]]:
    """Return the rows of the whole model and of three quarters and half of its layers, by greedy removal."""
    depths = {share: max(1, int(share * source.num_layers + Fraction(1, 2))) for share in SHOWN_DEPTHS}
    rows = {row.depth: row for row in remove_greedily(network, source, held_out, down_to=min(depths.values()))}
    return [(share, rows[depth]) for share, depth in depths.items()]
