"""A checkpoint's full weights by parameter name, without an engine, whatever layout wrote them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from raptr_ds.checkpoint.folder import checkpoints_at
from raptr_ds.checkpoint.read import fill_fragments, read_manifest, verify_files
from raptr_ds.config.sections import ModelSection
from raptr_ds.engine.fragments import WEIGHT, Fragment, Geometry


@dataclass(frozen=True)
class TrainedModel:
    """A trained model.

    weights: full fp32 tensors by canonical name. folder: the checkpoint that they are from; run_state: what the
    training loop recorded there.
    """

    model: ModelSection
    weights: dict[str, torch.Tensor]
    step: int
    folder: Path
    run_state: dict[str, Any] = field(default_factory=dict)


def load_trained_model(where: Path) -> TrainedModel:
    """Verify and read a checkpoint. where: its folder, or a run's, whose newest checkpoint is read.

    Raises: CheckpointError if there is no checkpoint or it is damaged.
    """
    folder = checkpoints_at(where)[0]
    manifest = read_manifest(folder)
    verify_files(folder, manifest, 0, 1)
    shapes = {entry.name: entry.geometry.full_shape for entry in manifest.entries}
    weights = {name: torch.empty(shape, dtype=torch.float32) for name, shape in shapes.items()}
    whole = [Fragment(name, WEIGHT, Geometry.of_whole(full), full.view(-1)) for name, full in weights.items()]
    fill_fragments(whole, folder, manifest)
    return TrainedModel(ModelSection(**manifest.model), weights, manifest.step, folder, manifest.run_state)
