"""What a run is made of: recorded in each checkpoint, and compared where a run continues."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raptr_ds.config.derive import balanced_layers
from raptr_ds.config.differences import differences
from raptr_ds.config.run import RunConfig
from raptr_ds.config.usage import look_up
from raptr_ds.data.digest import corpus_digest
from raptr_ds.data.loader import folders_of
from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.errors import CheckpointError

IDENTITY = "identity"
"""The key in a checkpoint's run state; checkpoints of earlier versions do not have it. What tools/import_hf.py writes
has the tokenizer's digest alone, or nothing."""

_WITHOUT_CONSEQUENCE = (
    "raptr_ds.train.save",
    "raptr_ds.log.",
    "raptr_ds.checkpoint.",
    "raptr_ds.eval.",
    "raptr_ds.parallel.",
    "raptr_ds.data.path",
    "raptr_ds.data.tokenizer",
    "raptr_ds.data.num_workers",
    "raptr_ds.data.prefetch",
    "raptr_ds.train.compile",
    "raptr_ds.model.vocab_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "zero_optimization.",
)
"""Keys that do not change what is trained, or whose change shows in a digest; for _LAYERS see `changes_since`."""

_LAYERS = "raptr_ds.parallel.pipeline_layers"


@dataclass(frozen=True)
class Identity:
    """Digests of the tokenizer and of the tokens, and the complete run file; plain JSON values."""

    tokenizer: str
    corpus: str
    config: dict[str, Any]

    @staticmethod
    def of(config: RunConfig, tokenizer: Tokenizer) -> Identity:
        """Return what a run is made of; reads samples of its data. Raises: DataError if they cannot be read."""
        return Identity(tokenizer.digest, corpus_digest(folders_of(config.data.path)), config.resolved())


@dataclass(frozen=True)
class Changes:
    """How a run differs from the checkpoint that it continues from.

    keys: (there, here) by dotted key of the run file. corpus: the digests of the tokens (there, here), None if they are
    the same. is_recorded: whether the checkpoint says what it was made of; nothing is compared if it does not.
    """

    keys: dict[str, tuple[Any, Any]]
    corpus: tuple[str, str] | None
    is_recorded: bool = True

    @property
    def lines(self) -> list[str]:
        """What to print about it, a line each."""
        lines = []
        if not self.is_recorded:
            lines.append("warning: the checkpoint does not record its tokenizer and corpus: they are not compared")
        if self.corpus is not None:
            lines.append(
                f"warning: the corpus is another than the checkpoint's (digest {self.corpus[0]} there, "
                f"{self.corpus[1]} here): the run continues on the new one"
            )
        return lines + [
            f"changed since the checkpoint: {key}={old!r}, now {new!r}" for key, (old, new) in self.keys.items()
        ]


def tokenizer_digest_in(run_state: dict[str, Any]) -> str | None:
    """Return the digest of the tokenizer that a checkpoint records, None if it is of a version that did not."""
    identity = run_state.get(IDENTITY)
    return None if identity is None else identity["tokenizer"]


def changes_since(run_state: dict[str, Any], here: Identity, folder: Path) -> Changes:
    """Return how the run differs from a checkpoint in `folder`.

    Raises: CheckpointError if the tokenizer is another one: every embedding would stand for another piece.
    """
    there = run_state.get(IDENTITY)
    if there is None:
        return Changes({}, None, is_recorded=False)
    if there["tokenizer"] != here.tokenizer:
        raise CheckpointError(
            f"{folder} was trained with another tokenizer (digest {there['tokenizer']}) than this run's data were "
            f"prepared with (digest {here.tokenizer}): its embeddings stand for other pieces. Prepare the data with "
            "the run's own tokenizer (tools/prepare_data.py --tokenizer FILE --overwrite), or train the new data in "
            "another folder (raptr_ds.train.save), or start anew with raptr_ds.checkpoint.load=none."
        )
    if "corpus" not in there:  # imported: no training came before
        return Changes({}, None)
    corpus = None if there["corpus"] == here.corpus else (there["corpus"], here.corpus)
    keys = differences(there["config"], here.config, _WITHOUT_CONSEQUENCE)
    before, now = map(_balanced_over, (there["config"], here.config))
    if before != now and None not in (before, now):  # balanced paths are others
        keys[_LAYERS] = look_up(there["config"], _LAYERS), look_up(here.config, _LAYERS)
    return Changes(keys, corpus)


def _balanced_over(config: dict[str, Any]) -> tuple[int, ...] | None:
    """Return the layers of each stage that a complete run's paths are balanced over, None for other sampling."""
    stages = look_up(config, "raptr_ds.path.balance_stages")
    if stages is None:
        return None
    return balanced_layers(look_up(config, "raptr_ds.model.num_layers"), stages, look_up(config, _LAYERS))
