"""Held-out text to measure depths on: the same samples as a run's own evaluation begins with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raptr_ds.config.sections import DataSection, ObjectiveSection
from raptr_ds.data import loader
from raptr_ds.data.batch import MicroBatch, collate
from raptr_ds.data.digest import corpus_digest
from raptr_ds.depth.source import ModelSource
from raptr_ds.errors import ConfigError, DataError

SEQUENCES = 128
_MICRO_BATCH = 16


@dataclass(frozen=True)
class HeldOut:
    """Micro batches, and what they are made of. folders: data folders, with their weights; digest: of their tokens."""

    batches: tuple[MicroBatch, ...]
    folders: Mapping[str, float]
    digest: str
    objective: Mapping[str, Any]
    num_sequences: int

    @property
    def num_predictions(self) -> int:
        """Predicted positions in all of it."""
        return sum(batch.num_predictions for batch in self.batches)

    def to_dict(self) -> dict[str, Any]:
        """Return what it is made of, wherever that lies, as plain JSON values."""
        return {
            "corpus": self.digest,
            "objective": dict(self.objective),
            "num_sequences": self.num_sequences,
            "num_predictions": self.num_predictions,
        }


def read_held_out(source: ModelSource, folder: Path | None = None, num_sequences: int = SEQUENCES) -> HeldOut:
    """Return the first samples of the validation split of a run's data, corrupted as the run does it.

    With the run's own number of sequences (train_batch_size x raptr_ds.eval.batches) the loss of the whole model is the
    one in its metrics. folder: another data folder, prepared with the same tokenizer.
    Raises: ConfigError if it is not known which; DataError if that cannot be used.
    """
    data, objective = _sections(source, folder)
    try:
        tokenizer = loader.load_tokenizer(data)
        maker = loader.build_objective(objective, source.trained.model, tokenizer, data.packing)
        folders = loader.folders_of(data.path)
        samples = loader.Samples(folders, "validation", maker, tokenizer, loader.VALIDATION_SEED)
    except DataError as error:
        what = str(error).removesuffix(".")  # it may end with a command
        raise DataError(f"no held-out text: {what}. Or name a prepared folder with --data FOLDER.") from error
    if tokenizer.digest != source.tokenizer.digest:
        raise DataError(
            f"{data.path} was prepared with another tokenizer (digest {tokenizer.digest}) than the model's (digest "
            f"{source.tokenizer.digest}). Prepare the text with that: tools/prepare_data.py --tokenizer "
            f"{source.tokenizer.origin}."
        )
    starts = range(0, num_sequences, _MICRO_BATCH)
    rows = (range(first, min(first + _MICRO_BATCH, num_sequences)) for first in starts)
    length, pad = source.trained.model.seq_length, tokenizer.pad_id
    batches = tuple(collate([samples[number] for number in ids], ids, length, pad) for ids in rows)
    made_by = objective.model_dump(mode="json", exclude_none=True)
    held_out = HeldOut(batches, folders, corpus_digest(folders, ["validation"]), made_by, num_sequences)
    if not held_out.num_predictions:
        raise DataError(f"the held-out text in {data.path} has nothing to predict. Name other text with --data FOLDER.")
    return held_out


def _sections(source: ModelSource, folder: Path | None) -> tuple[DataSection, ObjectiveSection]:
    settings = source.settings
    try:
        objective = ObjectiveSection(**settings.get("objective", {}))
        given = dict(settings.get("data", {}))
        known = {key: given[key] for key in ("path", "packing") if key in given}
        if folder is not None:
            known["path"] = str(folder)
        if "path" not in known:
            raise ConfigError(
                f"{source.label} does not record the data that it was trained on. Name a prepared folder with --data "
                "FOLDER."
            )
        return DataSection(**known, tokenizer=source.tokenizer.origin), objective
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the run file recorded by {source.label} is damaged: its data or objective cannot be read ({error})."
        ) from error
