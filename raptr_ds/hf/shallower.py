"""A trained model without some of its layers, as a model of its own that computes the same as a path of the whole."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch

from raptr_ds.checkpoint.weights import TrainedModel
from raptr_ds.errors import ConfigError
from raptr_ds.model.initialization import ends_branch
from raptr_ds.paths.path import LayerPath

_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Kept:
    """The layers of a model that are kept. loss: held-out, along their path, where it was measured."""

    path: LayerPath
    loss: float | None = None


def shallower(trained: TrainedModel, path: LayerPath) -> TrainedModel:
    """Return the layers of a path as a model of their own, numbered from 0.

    The path's residual scale goes into the matrices and biases by which each branch ends.
    Raises: ConfigError for a path without layers, or through parts of layers: no such model exists.
    """
    if not path.layers or path.parts is not None:
        raise ConfigError(
            "a model of no layers, or of parts of layers, cannot be made. Name whole layers, at least one."
        )
    place = {layer: str(number) for number, layer in enumerate(path.layers)}
    weights: dict[str, torch.Tensor] = {}
    for name, weight in trained.weights.items():
        match = _LAYER.fullmatch(name)
        if match is None:
            weights[name] = weight
        elif (layer := int(match[1])) in place:
            scaled = path.residual_scale != 1.0 and ends_branch(name)
            weights[f"layers.{place[layer]}.{match[2]}"] = weight * path.residual_scale if scaled else weight
    return replace(trained, model=trained.model.model_copy(update={"num_layers": path.length}), weights=weights)
