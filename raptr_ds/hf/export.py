"""A run or a checkpoint as a folder for transformers: weights, settings, tokenizer and model card."""

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from raptr_ds.checkpoint.folder import sync_folder
from raptr_ds.checkpoint.weights import TrainedModel
from raptr_ds.config.sections import ModelSection
from raptr_ds.data.indexed import open_indexed
from raptr_ds.data.manifest import TOKENIZER
from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.errors import ConfigError, DataError
from raptr_ds.hf.model import cast_parameters, to_hugging_face
from raptr_ds.hf.model_card import model_card
from raptr_ds.hf.shallower import Kept, shallower
from raptr_ds.hf.source import (
    WITHOUT,
    RunData,
    load_model,
    load_tokenizer,
    read_run_data,
    run_data_of,
    run_folder,
    settings_of,
    tokenizer_beside,
)
from raptr_ds.hf.tokenizer import SAMPLE_TEXTS, check_same_ids
from raptr_ds.hf.twins import twin_of
from raptr_ds.json_text import parse_json
from raptr_ds.runtime.metrics_file import METRICS, read_metrics
from raptr_ds.user_paths import exists, write_error

_COMPARED_DOCUMENTS = 300  # of each data folder, and of each document the beginning
_COMPARED_TOKENS = 1000
CARD = "README.md"
_MARKS = ("config.json", CARD, "model.safetensors", "model.safetensors.index.json")  # of a folder that holds a model
_UNFINISHED = ".unfinished"
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
    Raises: ConfigError, DataError or CheckpointError for what cannot be read or exported; PathError or StorageError for
    what cannot be written.
    """
    _check_size(max_shard_size)
    for name in _MARKS:
        if exists(output / name):
            raise ConfigError(f"{output} holds a {name} already, which is not overwritten. Name another folder.")
    trained = load_model(source)
    data = read_run_data(trained.folder, needed=tokenizer != WITHOUT)
    ours, theirs = load_tokenizer(tokenizer, data, trained), None
    if ours is not None:
        theirs = tokenizer_beside(trained.model, ours)
        check_same_ids(ours, theirs, chain(SAMPLE_TEXTS, _validation_texts(data, ours)))
    twin_of(trained.model)  # refuses a model that transformers lacks, before layers are chosen
    held_out, kept = _held_out(trained), None
    if choose is not None:
        kept = choose(trained)
        trained = shallower(trained, kept.path)
    model = to_hugging_face(trained.model, trained.weights, ours)
    cast_parameters(model, dtype)
    card = model_card(trained, settings_of(trained, data), held_out, kept, model, ours)
    try:
        _write(output, model, max_shard_size, ours, theirs, card)
    except (OSError, SafetensorError) as error:
        raise write_error(output, _system_error(error), "Name another folder.") from error
    return Exported(type(model).__name__, trained.folder, trained.step, ours is not None, kept)


def check_exportable(file: Path) -> None:
    """Check a run's config.json, with its vocabulary in it, for a model and a tokenizer that transformers has.

    file: `-` for standard input. Raises: ConfigError or DataError for what stands in the way.
    """
    try:
        text = sys.stdin.read() if file == Path("-") else file.read_text(encoding="utf-8")
        config = parse_json(text)
        model, data = ModelSection(**config["raptr_ds"]["model"]), run_data_of(config)
    except (OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{file} is not the config.json of a run ({type(error).__name__}: {error}).") from error
    twin_of(model)
    tokenizer = Tokenizer.load(data.tokenizer)
    check_same_ids(tokenizer, tokenizer_beside(model, tokenizer), SAMPLE_TEXTS)


def _check_size(text: str) -> None:
    match = _SIZE.fullmatch(text)
    if match is None or not float(match[1]):
        raise ConfigError(
            f"{text!r} is no size of a file of weights: give a number above 0 and KB, MB, GB or TB, as 5GB."
        )


def _held_out(trained: TrainedModel) -> tuple[int, float] | None:
    """Return step and loss of the last evaluation before the checkpoint, where it still lies in its run's folder."""
    try:
        metrics = read_metrics(run_folder(trained.folder) / METRICS)
        return metrics.last_evaluation(trained.model.num_layers, trained.step)
    except (DataError, OSError):  # damaged or unreadable measurements are no reason not to export
        return None


def _validation_texts(data: RunData | None, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the beginnings of documents in the run's validation data, as far as these can be read."""
    for folder in data.folders if data else ():
        try:
            documents = open_indexed(folder / "validation", tokenizer.vocab_size)
        except (DataError, OSError):  # moved or deleted since training, or prepared anew: no reason not to export
            continue
        for index in range(min(_COMPARED_DOCUMENTS, len(documents.lengths))):
            yield tokenizer.decode(documents.document(index)[:_COMPARED_TOKENS])


def _system_error(error: OSError | SafetensorError) -> OSError:
    """Return what the operating system refused, which safetensors has in its text alone: `... (os error 28)`."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))


def _write(
    output: Path,
    model: PreTrainedModel,
    max_shard_size: str,
    tokenizer: Tokenizer | None,
    exported: PreTrainedTokenizerFast | None,
    card: str,
) -> None:
    """Write the files into a folder inside the output, and move them out once they are complete and on the disk.

    What is left of a write that fails, or is interrupted, does not stand in the way of the next.
    """
    unfinished = output / _UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)  # which a killed export has left
    unfinished.mkdir(parents=True)
    try:
        if tokenizer is not None and exported is not None:
            tokenizer.save(unfinished / TOKENIZER)
            exported.save_pretrained(unfinished)
        model.save_pretrained(unfinished, max_shard_size=max_shard_size)
        for weights in unfinished.glob("*.safetensors"):  # which safetensors lets nobody else read
            shutil.copymode(unfinished / "config.json", weights)
        (unfinished / CARD).write_text(card, encoding="utf-8")
        files = sorted(unfinished.iterdir(), key=lambda file: file.name in _MARKS)  # these last
        for file in files:
            with file.open("rb") as written:
                os.fsync(written.fileno())
        for file in files:
            file.replace(output / file.name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    sync_folder(output)
