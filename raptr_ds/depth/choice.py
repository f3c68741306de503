"""The layers that `--layers` asks for: a number, a list, or those that greedy removal leaves."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from raptr_ds.depth.removal import DepthRow, evenly_spaced
from raptr_ds.depth.source import ModelSource
from raptr_ds.errors import ConfigError
from raptr_ds.hf.shallower import Kept

FORMS = "N (evenly spaced), 0,2,5 (these; of one layer 0,) or best:N (greedy removal; best: half of the layers)"


@dataclass(frozen=True)
class LayerChoice:
    """What was asked for. layers: these; or depth: how many, None for half; is_best: by greedy removal."""

    layers: tuple[int, ...] = ()
    depth: int | None = None
    is_best: bool = False

    def kept(self, source: ModelSource, best: Callable[[int], DepthRow]) -> Kept:
        """Return the layers of a model. best: gives the row of a depth, where greedy removal is asked for.

        Raises: ConfigError for layers or a number that the model does not have.
        """
        have = source.num_layers
        if beyond := [layer for layer in self.layers if layer >= have]:
            names = ", ".join(map(str, beyond))
            raise ConfigError(
                f"--layers: {source.label} has no layer {names}; it has {have}, 0 to {have - 1}. Leave out {names}."
            )
        if self.layers:
            return Kept(source.path(self.layers))
        depth = (have + 1) // 2 if self.depth is None else self.depth
        if not 1 <= depth <= have:
            raise ConfigError(
                f"--layers: {depth} layers of {source.label} cannot be kept; it has {have}. Give 1 to {have}."
            )
        if not self.is_best:
            return Kept(source.path(evenly_spaced(have, depth)))
        row = best(depth)
        return Kept(source.path(row.layers), row.loss)


def parse_layers(text: str) -> LayerChoice:
    """Return what `--layers` says: `6`, `0,2,5`, `best` or `best:6`. Raises: ConfigError if it says none of these."""
    spaceless = text.replace(" ", "")
    if match := re.fullmatch(r"best(?::(\d{1,6}))?|(\d{1,6})", spaceless):
        number = match[1] or match[2]
        return LayerChoice(depth=int(number) if number else None, is_best=spaceless.startswith("best"))
    if re.fullmatch(r"\d{1,6}(,\d{1,6})*,?", spaceless):
        layers = tuple(int(part) for part in spaceless.split(",") if part)
        if any(a >= b for a, b in pairwise(layers)):
            raise ConfigError(
                f"--layers {text}: layers run in the model's own order, each once. Write "
                f"{','.join(map(str, sorted(set(layers))))}."
            )
        return LayerChoice(layers)
    raise ConfigError(f"--layers {text!r} names no layers: give {FORMS}. Layers are counted from 0.")
