"""What the page asks a model: words filled in, texts completed, the loss of a text by depth."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import count
from typing import Any

import numpy as np

from raptr_ds.config.sections import Denoiser, ObjectiveSection
from raptr_ds.data.batch import MicroBatch, Sample, collate
from raptr_ds.data.denoisers import denoisers_of
from raptr_ds.data.tokenizer import WORD_BOUNDARY
from raptr_ds.depth.guesses import Blank, Guess, fill_masks
from raptr_ds.depth.network import Network
from raptr_ds.depth.removal import evenly_spaced
from raptr_ds.depth.sentences import token_texts, words_of
from raptr_ds.depth.source import ModelSource
from raptr_ds.depth.table import DepthTable
from raptr_ds.errors import ConfigError
from raptr_ds.hf.generation import Sampling
from raptr_ds.hf.load import PrefixModel, prefix_model_of
from raptr_ds.hf.shallower import shallower
from raptr_ds.hf.source import tokenizer_beside
from raptr_ds.hf.text import complete, prompt_tokens
from raptr_ds.paths.path import LayerPath

_GUESSES = 5
_MASKED_TOGETHER = 7  # of a text one token in so many is masked at once, as in pretraining, until each has been
_HOLE = re.compile(r"_{3,}")
_KEPT_MODELS = 4


@dataclass(frozen=True)
class DemoModel:
    """A model as the page sees it; one thread at a time. table: which layers each depth keeps; None: evenly spaced."""

    source: ModelSource
    network: Network
    table: DepthTable | None = None

    def about(self) -> dict[str, Any]:
        """Return what the page needs to know about the model, as plain JSON values."""
        model = self.source.trained.model
        depths = range(1, model.num_layers + 1)
        return {
            "label": self.source.label,
            "architecture": model.architecture,
            "step": self.source.trained.step,
            "width": model.hidden_size,
            "layers": [list(self.path(depth).layers) for depth in depths],
            "chosen": "by greedy removal" if self.table else "evenly spaced",
            "longest": model.seq_length,
            "modes": [{"name": name, "kind": one.kind} for name, one in self._modes.items()],
        }

    def path(self, depth: int) -> LayerPath:
        """Return the path of a depth. Raises: ConfigError for one that the model does not have."""
        have = self.source.num_layers
        if not 1 <= depth <= have:
            raise ConfigError(f"depth {depth}: the model has 1 to {have} layers.")
        if self.table is None:
            return self.source.path(evenly_spaced(have, depth))
        row = self.table.row(depth)
        return LayerPath(row.layers, have, residual_scale=row.residual_scale)

    def fill(self, text: str, hidden: Sequence[int], depth: int) -> list[dict[str, Any]]:
        """Return the words of a text, with what BERT fills in where they are hidden, or where the text has [MASK].

        hidden: numbers of words, in the order in which they are returned.
        Raises: ConfigError for a text that is too long, or a model that fills in no words.
        """
        tokenizer = self.source.tokenizer
        self._require("bert", "fills in hidden words")
        text_ids = self._tokens(text)
        words = words_of(tokenizer, text_ids)
        masks = np.flatnonzero(text_ids == tokenizer.mask_id).tolist()
        items = sorted([*words, *(range(place, place + 1) for place in masks)], key=lambda word: word.start)
        places = [place for number, word in enumerate(items) if number in set(hidden) for place in word]
        places = sorted({*places, *masks})
        tokens = np.concatenate([[tokenizer.cls_id], text_ids, [tokenizer.sep_id]])
        inside = [1 + place for place in places]
        tokens[inside] = tokenizer.mask_id
        right = text_ids[places].tolist()
        blanks = fill_masks(self.network, self.path(depth), tokens, inside, right, _GUESSES) if places else []
        at = dict(zip(places, blanks, strict=True))
        texts = token_texts(tokenizer, text_ids.tolist())
        return [self._word(text_ids, texts, item, [at[place] for place in item if place in at]) for item in items]

    def losses(self, text: str) -> dict[str, Any]:
        """Return the mean loss of a text's tokens by depth: `removed` along each depth's path, `exits` left early.

        BERT: each token masked once, one in seven at a time. UL2: of the second half, the first one being the prefix.
        """
        batches = self._masked_batches(text) if self._is_bert else self._continued_batches(text)
        depths = range(1, self.source.num_layers + 1)
        return {
            "removed": [self.network.loss(batches, self.path(depth)) for depth in depths],
            "exits": self.network.losses_by_exit(batches, self.path(self.source.num_layers)),
            "tokens": sum(batch.num_predictions for batch in batches),
        }

    def complete(
        self, text: str, mode: str, depth: int, sampling: Sampling, max_new_tokens: int, write: Callable[[str], None]
    ) -> str:
        """Write what UL2 completes a text by, piece by piece, and return why it ends.

        mode: one of `about`'s; of a mode with spans the text's holes (___, or sentinels) are filled.
        Raises: ConfigError for a mode that the model lacks, or a text without room or holes.
        """
        self._require("ul2", "completes texts")
        if mode not in self._modes:
            raise ConfigError(f"mode {mode!r}: the model has {', '.join(self._modes)}.")
        denoiser, numbers = self._modes[mode], count()
        fills = denoiser.kind == "span"
        if fills:
            text = _HOLE.sub(lambda _: f"<extra_id_{next(numbers)}>", text)
            if "<extra_id_" not in text:
                raise ConfigError("Write ___ (three underscores) where words are missing.")
        tokens = prompt_tokens(self._tokenizer, text, denoiser.mode)
        if not tokens:
            raise ConfigError("Write a text to begin with.")
        return complete(
            self._twins(depth),
            tokens,
            write,
            fills=fills,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            prefix_length=1 if denoiser.kind == "causal" else None,
        )

    @property
    def _is_bert(self) -> bool:
        return self.source.trained.model.architecture == "bert"

    @cached_property
    def _twins(self) -> Callable[[int], PrefixModel]:
        """The twins of the depths that were asked for last, by depth."""

        @lru_cache(maxsize=_KEPT_MODELS)
        def twin(depth: int) -> PrefixModel:
            made = prefix_model_of(shallower(self.source.trained, self.path(depth)), self.source.tokenizer)
            made.model.to(self.network.device)  # type: ignore[arg-type]
            return made

        return twin

    @cached_property
    def _tokenizer(self):  # its type is transformers'
        return tokenizer_beside(self.source.trained.model, self.source.tokenizer)

    @cached_property
    def _modes(self) -> dict[str, Denoiser]:
        """The first denoiser of each mode, by the mode's name."""
        if self._is_bert:
            return {}
        found: dict[str, Denoiser] = {}
        for one in denoisers_of(ObjectiveSection(**self.source.settings.get("objective", {}))):
            found.setdefault((one.mode or "none").strip("[]"), one)
        return dict(sorted(found.items(), key=lambda item: item[1].kind == "span"))

    def _require(self, architecture: str, what: str) -> None:
        if self.source.trained.model.architecture != architecture:
            raise ConfigError(f"{self.source.label} is no {architecture} model, which {what}.")

    def _tokens(self, text: str) -> np.ndarray:
        """Return a text's ids (n,) int64; [MASK] in it is a mask."""
        ids = prompt_tokens(self._tokenizer, text, None)
        room = self.source.trained.model.seq_length - 2
        if len(ids) > room:
            raise ConfigError(f"The text has {len(ids):,} tokens, and the model takes {room:,}: shorten it.")
        return np.array(ids, np.int64)

    def _word(self, ids: np.ndarray, texts: list[str], word: range, blanks: list[Blank]) -> dict[str, Any]:
        tokenizer = self.source.tokenizer
        is_mask = int(ids[word.start]) == tokenizer.mask_id
        first = tokenizer.pieces(ids[word.start : word.start + 1])[0]
        return {
            "text": "[MASK]" if is_mask else "".join(texts[place] for place in word).strip(),
            "space": is_mask or first.startswith(WORD_BOUNDARY),
            "breaks": word.start > 0 and int(ids[word.start - 1]) == tokenizer.newline_id,
            "typed": is_mask,
            "blanks": [
                {
                    "guesses": [
                        {**self._guess(one), "is_right": not is_mask and one.tokens == blank.right.tokens}
                        for one in blank.guesses
                    ],
                    "right": None if is_mask else self._guess(blank.right),
                }
                for blank in blanks
            ],
        }

    def _guess(self, guess: Guess) -> dict[str, Any]:
        piece = self.source.tokenizer.pieces(guess.tokens)[0]
        text = self.source.tokenizer.decode(guess.tokens)
        return {"text": text.replace("\n", "\u21b5") or piece, "probability": guess.probability}

    def _masked_batches(self, text: str) -> list[MicroBatch]:
        tokenizer, ids = self.source.tokenizer, self._tokens(text)
        candidates = np.flatnonzero(~tokenizer.is_special[ids])
        if not len(candidates):
            raise ConfigError("Write a text to see its loss.")
        whole = np.concatenate([[tokenizer.cls_id], ids, [tokenizer.sep_id]])
        samples = []
        for first in range(min(_MASKED_TOGETHER, len(candidates))):
            places = 1 + candidates[first::_MASKED_TOGETHER]
            tokens = whole.copy()
            tokens[places] = tokenizer.mask_id
            samples.append(Sample(tokens, places, whole[places], len(whole)))
        return [collate(samples, range(len(samples)), len(whole), tokenizer.pad_id)]

    def _continued_batches(self, text: str) -> list[MicroBatch]:
        follower = next((one for one in self._modes.values() if one.kind != "span"), None)
        ids = prompt_tokens(self._tokenizer, _HOLE.sub(" ", text), follower and follower.mode)
        known = max(1, (len(ids) + 1) // 2) if follower is None or follower.kind == "prefix" else 1
        longest = self.source.trained.model.seq_length
        if len(ids) - known < 1:
            raise ConfigError("Write a text to see its loss.")
        if len(ids) > longest:
            raise ConfigError(f"The text has {len(ids):,} tokens, and the model takes {longest:,}: shorten it.")
        tokens = np.array(ids, np.int64)
        sample = Sample(tokens, np.arange(known - 1, len(ids) - 1), tokens[known:], known)
        return [collate([sample], [0], len(ids), self.source.tokenizer.pad_id)]
