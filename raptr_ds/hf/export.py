"""A run or a checkpoint as a folder for transformers: weights, settings, tokenizer and model card."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from raptr_ds.checkpoint.folder import sync_folder
from raptr_ds.checkpoint.weights import TrainedModel
from raptr_ds.data.indexed import open_indexed
from raptr_ds.data.manifest import TOKENIZER
from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.errors import ConfigError, DataError
from raptr_ds.hf.model import cast_parameters, to_hugging_face
from raptr_ds.hf.model_card import RunNumbers, model_card
from raptr_ds.hf.shallower import Kept, shallower
from raptr_ds.hf.source import WITHOUT, RunData, load_model, load_tokenizer, read_run_data, run_folder, tokenizer_beside
from raptr_ds.hf.tokenizer import SAMPLE_TEXTS, check_same_ids
from raptr_ds.hf.twins import twin_of
from raptr_ds.runtime.identity import IDENTITY
from raptr_ds.runtime.metrics_file import METRICS, last_evaluation
from raptr_ds.user_paths import exists

_COMPARED_DOCUMENTS = 300  # of each data folder, and of each document the beginning
_COMPARED_TOKENS = 1000
CARD = "README.md"
LARGEST_SHARD = "50GB"  # transformers' own default
_SIZE = re.compile(r"\s*(\d+(\.\d+)?)\s*[KMGT]B\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Exported:
    """What was written. kind: transformers' class; folder, step: the checkpoint that it is from; kept: its layers."""

    kind: str
    folder: Path
    step: int
    has_tokenizer: bool
    kept: Kept | None = None


def export(
    source: Path,
    output: Path,
    dtype: torch.dtype,
    tokenizer: str | None = None,
    max_shard_size: str = LARGEST_SHARD,
    choose: Callable[[TrainedModel], Kept] | None = None,
) -> Exported:
    """Write the newest model of a run, or the one of a checkpoint, for transformers' from_pretrained.

    tokenizer: a file, `none` for the weights alone, or None for the one that the run's data have. It is written if it
    gives the same ids as ours: for difficult texts, and for validation documents of the run as far as its data folder
    is there. max_shard_size: of a file of weights, as 500MB or 5GB. choose: the layers of a shallower model.
    Raises: ConfigError, DataError or CheckpointError for what cannot be read, exported or written.
    """
    _check_size(max_shard_size)
    for name in ("config.json", CARD):
        if exists(output / name):
            raise ConfigError(f"{output} holds a {name} already, which is not overwritten. Name another folder.")
    trained = load_model(source)
    data = read_run_data(trained.folder, needed=tokenizer != WITHOUT)
    ours, theirs = load_tokenizer(tokenizer, data, trained), None
    if ours is not None:
        theirs = tokenizer_beside(trained, ours)
        check_same_ids(ours, theirs, chain(SAMPLE_TEXTS, _validation_texts(data, ours)))
    twin_of(trained.model)  # refuses a model that transformers lacks, before layers are chosen
    numbers, kept = _run_numbers(trained, data), None
    if choose is not None:
        kept = choose(trained)
        trained = shallower(trained, kept.path)
    model = to_hugging_face(trained.model, trained.weights, ours)
    cast_parameters(model, dtype)
    card = model_card(trained, replace(numbers, kept=kept), model, ours)
    try:
        _write(output, model, max_shard_size, ours, theirs)
        (output / CARD).write_text(card, encoding="utf-8")
        _put_on_disk(output)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"cannot write {output}: {getattr(error, 'strerror', None) or error}. Name another folder."
        ) from error
    return Exported(type(model).__name__, trained.folder, trained.step, ours is not None, kept)


def _check_size(text: str) -> None:
    match = _SIZE.fullmatch(text)
    if match is None or not float(match[1]):
        raise ConfigError(
            f"{text!r} is no size of a file of weights: give a number above 0 and KB, MB, GB or TB, as 5GB."
        )


def _run_numbers(trained: TrainedModel, data: RunData | None) -> RunNumbers:
    """Return what the checkpoint records of its run, and the run's folder where it still lies in it."""
    recorded = trained.run_state.get(IDENTITY) or {}
    config = recorded.get("config") or (data.config if data else {})
    try:
        held_out = last_evaluation(run_folder(trained.folder) / METRICS, trained.model.num_layers, trained.step)
    except (DataError, OSError):  # damaged or unreadable measurements are no reason not to export
        held_out = None
    return RunNumbers(config, held_out)


def _validation_texts(data: RunData | None, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the beginnings of documents in the run's validation data, as far as these can be read."""
    for folder in data.folders if data else ():
        try:
            documents = open_indexed(folder / "validation", tokenizer.vocab_size)
        except (DataError, OSError):  # moved or deleted since training, or prepared anew: no reason not to export
            continue
        for index in range(min(_COMPARED_DOCUMENTS, len(documents.lengths))):
            yield tokenizer.decode(documents.document(index)[:_COMPARED_TOKENS])


def _write(
    output: Path,
    model: PreTrainedModel,
    max_shard_size: str,
    tokenizer: Tokenizer | None,
    exported: PreTrainedTokenizerFast | None,
) -> None:
    output.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None and exported is not None:
        tokenizer.save(output / TOKENIZER)
        exported.save_pretrained(output)
    model.save_pretrained(output, max_shard_size=max_shard_size)
    for weights in output.glob("*.safetensors"):  # which safetensors lets nobody else read
        shutil.copymode(output / "config.json", weights)


def _put_on_disk(folder: Path) -> None:
    """Wait until what was written is on the disk, so that a crash of the machine leaves no half of a model."""
    for file in folder.iterdir():
        if file.is_file():
            with file.open("rb") as written:
                os.fsync(written.fileno())
    sync_folder(folder)
