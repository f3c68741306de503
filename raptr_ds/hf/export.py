"""A run or a checkpoint as a folder for transformers: weights, settings, tokenizer and model card."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from raptr_ds.checkpoint.folder import CHECKPOINTS, checkpoints_at
from raptr_ds.checkpoint.manifest import DamagedCheckpointError
from raptr_ds.checkpoint.weights import TrainedModel, load_trained_model
from raptr_ds.data.indexed import open_indexed
from raptr_ds.data.loader import folders_of
from raptr_ds.data.manifest import TOKENIZER
from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.errors import CheckpointError, ConfigError, DataError
from raptr_ds.hf.model import cast_parameters, to_hugging_face
from raptr_ds.hf.model_card import RunNumbers, model_card
from raptr_ds.hf.tokenizer import SAMPLE_TEXTS, check_same_ids, tokenizer_to_hugging_face
from raptr_ds.runtime.identity import IDENTITY, tokenizer_digest_in
from raptr_ds.runtime.metrics_file import METRICS, last_evaluation
from raptr_ds.user_paths import exists

_COMPARED_DOCUMENTS = 300  # of each data folder, and of each document the beginning
_COMPARED_TOKENS = 1000
CARD = "README.md"
LARGEST_SHARD = "50GB"  # transformers' own default
_SIZE = re.compile(r"\s*(\d+(\.\d+)?)\s*[KMGT]B\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Exported:
    """What was written. kind: transformers' class; folder, step: the checkpoint that it is from."""

    kind: str
    folder: Path
    step: int
    has_tokenizer: bool


@dataclass(frozen=True)
class _RunData:
    """A run's config.json, and what it names. folders: the prepared ones; tokenizer: its file."""

    config: dict[str, Any]
    folders: tuple[Path, ...]
    tokenizer: Path


def export(
    source: Path,
    output: Path,
    dtype: torch.dtype,
    tokenizer: str | None = None,
    max_shard_size: str = LARGEST_SHARD,
) -> Exported:
    """Write the newest model of a run, or the one of a checkpoint, for transformers' from_pretrained.

    tokenizer: a file, `none` for the weights alone, or None for the one that the run's data have. It is written if it
    gives the same ids as ours: for difficult texts, and for validation documents of the run as far as its data folder
    is there. max_shard_size: of a file of weights, as 500MB or 5GB.
    Raises: ConfigError, DataError or CheckpointError for what cannot be read, exported or written.
    """
    _check_size(max_shard_size)
    for name in ("config.json", CARD):
        if exists(output / name):
            raise ConfigError(f"{output} holds a {name} already, which is not overwritten. Name another folder.")
    trained = _load_model(source)
    data = _read_run_data(trained.folder, needed=tokenizer != "none")
    ours, theirs = _load_tokenizer(tokenizer, data, trained), None
    if ours is not None:
        section = trained.model
        has_token_types = section.position_embedding == "learned"  # as MegatronBert, unlike ESM
        theirs = tokenizer_to_hugging_face(ours, section.architecture, section.seq_length, has_token_types)
        check_same_ids(ours, theirs, chain(SAMPLE_TEXTS, _validation_texts(data, ours)))
    model = to_hugging_face(trained.model, trained.weights, ours)
    cast_parameters(model, dtype)
    card = model_card(trained, _run_numbers(trained, data), model, ours)
    try:
        _write(output, model, max_shard_size, ours, theirs)
        (output / CARD).write_text(card, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"cannot write {output}: {getattr(error, 'strerror', None) or error}. Name another folder."
        ) from error
    return Exported(type(model).__name__, trained.folder, trained.step, ours is not None)


def _check_size(text: str) -> None:
    match = _SIZE.fullmatch(text)
    if match is None or not float(match[1]):
        raise ConfigError(
            f"{text!r} is no size of a file of weights: give a number above 0 and KB, MB, GB or TB, as 5GB."
        )


def _load_model(source: Path) -> TrainedModel:
    """Return the newest model of a run, or the one of a checkpoint. Raises: CheckpointError naming the folder."""
    try:
        folder = checkpoints_at(source)[0]
        try:
            return load_trained_model(folder)
        except DamagedCheckpointError as error:
            raise CheckpointError(
                f"the checkpoint {folder} is damaged: {error}. Name another step-... folder of the run."
            ) from error
    except OSError as error:
        raise CheckpointError(
            f"cannot read the checkpoints in {source}: {error.strerror or error}. Check its permissions."
        ) from error


def _run_folder(checkpoint: Path) -> Path:
    """Return the folder of the run that a checkpoint lies in, if it lies in one."""
    folder = checkpoint.absolute().parent
    return folder.parent if folder.name == CHECKPOINTS else folder


def _read_run_data(checkpoint: Path, needed: bool) -> _RunData | None:
    """Return the data of the run that a checkpoint lies in; None without the run's config.json.

    Raises: ConfigError if config.json cannot be read or does not name the data, and these are needed.
    """
    config = _run_folder(checkpoint) / "config.json"
    try:
        tree = json.loads(config.read_text(encoding="utf-8"))
        content = tree["raptr_ds"]["data"]
        folders = tuple(map(Path, folders_of(content["path"])))
        return _RunData(tree, folders, Path(content.get("tokenizer") or folders[0] / TOKENIZER))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        if not needed:
            return None
        if isinstance(error, OSError):
            raise ConfigError(f"cannot read {config}: {error.strerror or error}. Check its permissions.") from error
        raise ConfigError(
            f"{config} is damaged, or not the configuration of a run: raptr_ds.data.path, which leads to the "
            f"tokenizer, cannot be read ({type(error).__name__}: {error}). Restore it, or move it away and name the "
            "tokenizer with --tokenizer FILE."
        ) from error


def _run_numbers(trained: TrainedModel, data: _RunData | None) -> RunNumbers:
    """Return what the checkpoint records of its run, and the run's folder where it still lies in it."""
    recorded = trained.run_state.get(IDENTITY) or {}
    config = recorded.get("config") or (data.config if data else {})
    try:
        held_out = last_evaluation(_run_folder(trained.folder) / METRICS, trained.model.num_layers, trained.step)
    except (DataError, OSError):  # damaged or unreadable measurements are no reason not to export
        held_out = None
    return RunNumbers(config, held_out)


def _load_tokenizer(named: str | None, data: _RunData | None, trained: TrainedModel) -> Tokenizer | None:
    """Return the tokenizer that the user or the run names, None if neither does.

    Raises: DataError if it cannot be read, or is not the one that the model was trained with; of a checkpoint that
    does not record its tokenizer, the size alone is known.
    """
    path = Path(named) if named else data and data.tokenizer
    if named == "none" or path is None:
        return None
    if not named and not os.access(path, os.R_OK):
        raise DataError(
            f"the tokenizer {path}, which the run's config.json leads to, is not there or cannot be read. Name it with "
            "--tokenizer FILE, or export the weights without it by --tokenizer none."
        )
    tokenizer = Tokenizer.load(path)
    recorded = tokenizer_digest_in(trained.run_state)
    if tokenizer.vocab_size != trained.model.vocab_size:
        difference = f"it has {tokenizer.vocab_size} entries, the model {trained.model.vocab_size}"
    elif recorded not in (None, tokenizer.digest):
        difference = f"its digest is {tokenizer.digest}, and {trained.folder} records {recorded}"
    else:
        return tokenizer
    raise DataError(
        f"the tokenizer {path} is not the one that the model was trained with: {difference}. Name that one with "
        "--tokenizer FILE, or export the weights without it by --tokenizer none."
    )


def _validation_texts(data: _RunData | None, tokenizer: Tokenizer) -> Iterator[str]:
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
