"""Sentences of held-out text to show a model, and the text of single tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from raptr_ds.data.indexed import IndexedTokens, open_indexed
from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.depth.held_out import HeldOut
from raptr_ds.rng import stream

T = TypeVar("T")

_END = re.compile(r"(?<=[.!?])\s+")
_PROSE = re.compile(r"[^\W\d_][\w\s,;:'\"()/-]+[.!?]")
_FEWEST_WORDS, _MOST_WORDS = 7, 22
_TRIED_DOCUMENTS = 400
_WINDOW_TOKENS = 24
_INCOMPLETE = "\ufffd"  # what bytes decode to that are a part of a character


def held_out_sentences(
    held_out: HeldOut, tokenizer: Tokenizer, number: int, most_tokens: int, seed: int = 0
) -> list[np.ndarray]:
    """Return the tokens of sentences, drawn by the seed; stretches where there is no prose.

    A document is in use again only after every other one. Shapes: (n,) int64 each, n <= most_tokens. There may be fewer
    than asked for in a small corpus.
    """
    documents = [open_indexed(Path(folder) / "validation", tokenizer.vocab_size) for folder in held_out.folders]
    texts = list(_documents(documents, seed))
    prose = _by_turns(_sentences(tokenizer, tokens, seed) for tokens in texts)
    found = (tokenizer.encode(sentence).astype(np.int64) for sentence in prose)
    sentences = list(islice((tokens for tokens in found if len(tokens) <= most_tokens), number))
    stretches = _by_turns(_stretches(tokens, min(_WINDOW_TOKENS, most_tokens)) for tokens in texts)
    return sentences + list(islice((part for part in stretches if len(part) > 2), number - len(sentences)))


def _by_turns(documents: Iterable[Iterator[T]]) -> Iterator[T]:
    """Yield the first part of each document, then the second of each that has one, and so on."""
    rest = list(documents)
    while rest:
        used, rest = rest, []
        for document in used:
            for part in islice(document, 1):
                yield part
                rest.append(document)


def _documents(corpora: Sequence[IndexedTokens], seed: int) -> Iterator[np.ndarray]:
    """Yield documents without the token that ends them, each once, in an order drawn by the seed."""
    places = [(corpus, index) for corpus in corpora for index in range(len(corpus.lengths))]
    order = np.argsort(stream(seed, "shown documents").random(len(places)), kind="stable")
    for place in order[:_TRIED_DOCUMENTS].tolist():
        corpus, index = places[place]
        yield corpus.document(index)[:-1].astype(np.int64)


def _stretches(tokens: np.ndarray, length: int) -> Iterator[np.ndarray]:
    """Yield a document's tokens, so many at a time."""
    return (tokens[first : first + length] for first in range(0, len(tokens), length))


def _sentences(tokenizer: Tokenizer, tokens: np.ndarray, seed: int) -> Iterator[str]:
    """Yield the sentences of a document's paragraphs that read as prose, from a drawn place on."""
    text = tokenizer.decode(tokens)
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n|\n(?=\s*[-*#:.])", text))
    found = [
        sentence
        for paragraph in paragraphs
        for sentence in _END.split(paragraph)
        if _PROSE.fullmatch(sentence)
        and not sentence[0].islower()
        and _FEWEST_WORDS <= len(sentence.split()) <= _MOST_WORDS
    ]
    first = int(stream(seed, "shown sentence", len(text)).integers(max(1, len(found))))
    yield from found[first:] + found[:first]


def token_texts(tokenizer: Tokenizer, tokens: Iterable[int]) -> list[str]:
    """Return what each token adds to the text; a character whose bytes are several tokens comes with the last one."""
    tokens, texts, shown = list(tokens), [], ""
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:end])
        complete = text.rstrip(_INCOMPLETE) if end < len(tokens) else text
        texts.append(complete[len(shown) :])
        shown = complete
    return texts


def words_of(tokenizer: Tokenizer, tokens: np.ndarray) -> list[range]:
    """Return the places of each word's tokens; punctuation is a word of its own, special tokens and newlines none."""
    words: list[range] = []
    is_text = ~tokenizer.is_special[tokens] & (tokens != tokenizer.newline_id)
    is_lettered: bool | None = None  # whether the word so far has letters or digits; None while it has no text
    for place, text in enumerate(token_texts(tokenizer, tokens)):
        if not is_text[place]:
            continue
        lettered = any(map(str.isalnum, text)) if text.strip() else None  # bytes wait for their character
        follows = bool(words) and words[-1].stop == place and not tokenizer.starts_word[tokens[place]]
        if follows and (lettered is None or is_lettered in (None, lettered)):
            words[-1] = range(words[-1].start, place + 1)
            is_lettered = is_lettered if lettered is None else lettered
        else:
            words.append(range(place, place + 1))
            is_lettered = lettered
    return words
