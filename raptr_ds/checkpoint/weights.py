"""A checkpoint's full weights by name, whatever layout wrote it, without an engine."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from raptr_ds.checkpoint.folder import checkpoints_at
from raptr_ds.checkpoint.manifest import Manifest
from raptr_ds.checkpoint.read import fill_engine, read_manifest, verify_files
from raptr_ds.config.sections import ModelSection
from raptr_ds.engine.fragments import WEIGHT, Fragment
from raptr_ds.engine.protocol import Engine
from raptr_ds.parallel.layers import TensorShard


@dataclass(frozen=True)
class TrainedModel:
    """What was trained. weights: full fp32 tensors by canonical name. folder: the checkpoint that they are from."""

    model: ModelSection
    weights: dict[str, torch.Tensor]
    step: int
    folder: Path


def load_trained_model(where: Path) -> TrainedModel:
    """Read the newest checkpoint of a run, or the one that `where` is; files are verified first.

    Raises: CheckpointError if there is none, or it is damaged.
    """
    folder = checkpoints_at(where)[0]
    manifest = read_manifest(folder)
    verify_files(folder, manifest, 0, 1)
    holder = _WeightsHolder(manifest)
    fill_engine(cast(Engine, holder), folder, manifest)
    return TrainedModel(ModelSection(**manifest.model), holder.weights, manifest.step, folder)


class _WeightsHolder:
    """As much of an engine as reading a checkpoint takes: room for the whole of every weight, and no other state."""

    def __init__(self, manifest: Manifest) -> None:
        shapes = {entry.name: entry.geometry.full_shape for entry in manifest.entries}
        self.weights = {name: torch.empty(shape, dtype=torch.float32) for name, shape in shapes.items()}

    def fragments(self) -> list[Fragment]:
        return [
            Fragment(name, WEIGHT, TensorShard(tuple(weight.shape)), tuple(weight.shape), 0, weight.view(-1))
            for name, weight in self.weights.items()
        ]

    def create_state(self, kinds: Mapping[str, set[str]], counts: Mapping[str, float]) -> None:
        """Make no room for optimizer state."""

    def load_loss_scaler_state(self, values: Mapping[str, Any]) -> None:
        """Need none."""
