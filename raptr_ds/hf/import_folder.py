"""A folder of transformers as a checkpoint to start from: the inverse of an export."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from raptr_ds.checkpoint.folder import CHECKPOINTS, step_folder
from raptr_ds.checkpoint.manager import Checkpoints
from raptr_ds.config.optimization import OPTIMIZERS, canonical
from raptr_ds.config.sections import ModelSection
from raptr_ds.data.manifest import TOKENIZER
from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.engine.reference import ReferenceEngine
from raptr_ds.errors import ConfigError, DataError, nearest
from raptr_ds.hf.load import load_exported
from raptr_ds.hf.model import from_hugging_face
from raptr_ds.hf.source import exported_kind
from raptr_ds.hf.twins import TWINS
from raptr_ds.model.stage import build_stage
from raptr_ds.parallel.groups import lone_process_groups
from raptr_ds.runtime.identity import IDENTITY
from raptr_ds.runtime.method import LAYERS
from raptr_ds.runtime.state import OPTIMIZER, RunState
from raptr_ds.sentencepiece_model import read_sentencepiece_model
from raptr_ds.user_paths import exists, is_file, is_folder


@dataclass(frozen=True)
class Imported:
    """What was written. kind: transformers' class; model: ours; checkpoint: its folder, of step 0.

    tokenizer: the file beside the model whose digest is recorded, None if there is none that we can read.
    """

    kind: str
    model: ModelSection
    checkpoint: Path
    tokenizer: Path | None


def import_folder(folder: Path, output: Path, optimizer: str) -> Imported:
    """Write the model of a transformers folder as the checkpoint of step 0 of a run.

    optimizer: the type that the run file names; it has no state yet.
    Raises: ConfigError for a folder that holds no model that one of ours computes the same as, an output that holds
    a run, or an optimizer that no run can have; PathError or StorageError for an output that cannot be written.
    """
    if exists(output / CHECKPOINTS):
        raise ConfigError(f"{output} holds checkpoints already. Name another folder.")
    if (known := canonical(optimizer, OPTIMIZERS)) is None:
        guess = nearest(optimizer, OPTIMIZERS) or "."
        raise ConfigError(f"--optimizer {optimizer} must be one of {', '.join(OPTIMIZERS)}{guess}")
    kind, model, weights = read_exported(folder)
    tokenizer = _tokenizer_in(folder, model)
    state = {**asdict(RunState()), OPTIMIZER: known, LAYERS: list(range(model.num_layers))}
    if tokenizer is not None:
        state |= {IDENTITY: {"tokenizer": tokenizer.digest}}
    _write(output, model, weights, state)
    file = None if tokenizer is None else folder / TOKENIZER
    return Imported(kind, model, step_folder(output / CHECKPOINTS, 0), file)


def read_exported(folder: Path) -> tuple[str, ModelSection, dict[str, torch.Tensor]]:
    """Return the model in a folder of transformers: its class there, our section, fp32 weights by canonical name.

    Raises: ConfigError for a folder that holds no model that one of ours computes the same as.
    """
    if not is_folder(folder):
        raise ConfigError(f"{folder}: there is no such folder. Name one that save_pretrained has written.")
    kind = exported_kind(folder)
    twin = next((twin for twin in TWINS if twin.kind.__name__ == kind), None)
    if twin is None:
        holds = f"holds a {kind}" if kind else "has no config.json of transformers"
        known = ", ".join(twin.kind.__name__ for twin in TWINS)
        raise ConfigError(f"{folder} {holds}, and what can be imported is {known}.")
    model, weights = from_hugging_face(load_exported(folder, twin.kind, lambda _, name: name in twin.lacks))
    return twin.kind.__name__, model, {name: tensor.float() for name, tensor in weights.items()}


def _tokenizer_in(folder: Path, model: ModelSection) -> Tokenizer | None:
    """Return the tokenizer beside a model, if data for this model can be prepared with it as it is."""
    if not is_file(folder / TOKENIZER):
        return None
    try:
        tokenizer = Tokenizer.load(folder / TOKENIZER)
        read_sentencepiece_model(tokenizer.model, tokenizer.origin)
    except DataError:  # another project's, which lacks our special tokens or has options that are not supported
        return None
    return tokenizer if tokenizer.vocab_size == model.vocab_size else None


def _write(output: Path, model: ModelSection, weights: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    with lone_process_groups() as groups:
        stage = build_stage(model, groups, range(model.num_layers), recompute=False, seed=0)
        stage.load_state_dict(weights)
        engine = ReferenceEngine(stage, seed=0, skipped_update="freeze", max_norm=0.0)
        checkpoints = Checkpoints(output / CHECKPOINTS, groups, keep=1)
        try:
            checkpoints.save(engine, 0, model, state)
            (report,) = checkpoints.wait()
        finally:
            checkpoints.close()
    if report.error is not None:
        raise ConfigError(f"the checkpoint could not be written: {report.error}. Name another folder.")
