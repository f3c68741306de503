"""Optimizer parameter groups by layer and weight decay, so that an optimizer can step some layers only."""

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from raptr_ds.paths.path import LayerPath

NO_LAYER = -1

_LAYER = re.compile(r"^layers\.(\d+)\.")


def layer_of(name: str) -> int:
    """Return the global layer index in a canonical parameter name, NO_LAYER for embedding and head."""
    match = _LAYER.match(name)
    return int(match[1]) if match else NO_LAYER


def is_decayed(parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, not to biases and norms (as Megatron)."""
    return parameter.ndim > 1


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float | None) -> list[dict[str, Any]]:
    """Return torch optimizer groups of canonical (name, parameter) pairs, each with its `layer` and `names`.

    weight_decay None leaves the optimizer's own default to matrices.
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in named:
        layer, decayed = layer_of(name), is_decayed(parameter)
        group = groups.setdefault((layer, decayed), {"params": [], "layer": layer, "names": []})
        if not decayed or weight_decay is not None:
            group["weight_decay"] = weight_decay if decayed else 0.0
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def layers_on(path: LayerPath) -> Callable[[int], bool]:
    """Return which layers run on `path`; NO_LAYER, embedding and head, always does."""
    return lambda layer: layer == NO_LAYER or path.is_active(layer)


def every_layer(_layer: int) -> bool:
    """Return True."""
    return True
