"""Which layers to keep: evenly spaced ones, or what is left when those that cost least held-out loss are removed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from raptr_ds.depth.held_out import HeldOut
from raptr_ds.depth.network import Network
from raptr_ds.depth.source import ModelSource
from raptr_ds.errors import ConfigError, DataError
from raptr_ds.hf.shallower import Kept
from raptr_ds.paths.path import LayerPath

FORMS = "N (evenly spaced), 0,2,5 (these; of one layer 0,) or best:N (greedy removal; best: half of the layers)"


@dataclass(frozen=True)
class DepthRow:
    """A model of some depth. layers: those that it keeps; residual_scale: the factor on their branches.

    loss: held-out, in nats per predicted token. exit_loss: that of the whole model left after as many of its first
    layers.
    """

    layers: tuple[int, ...]
    residual_scale: float
    loss: float
    exit_loss: float

    @property
    def depth(self) -> int:
        """Layers that are kept."""
        return len(self.layers)


def evenly_spaced(num_layers: int, depth: int) -> tuple[int, ...]:
    """Return `depth` of the layers, as evenly spaced as whole numbers allow; from two on the first and the last."""
    assert 1 <= depth <= num_layers, (depth, num_layers)
    if depth == 1:
        return (0,)
    gaps = depth - 1
    return tuple((2 * place * (num_layers - 1) + gaps) // (2 * gaps) for place in range(depth))


def remove_greedily(
    network: Network,
    source: ModelSource,
    held_out: HeldOut,
    down_to: int = 1,
    on_row: Callable[[DepthRow], None] = lambda row: None,
) -> list[DepthRow]:
    """Return a row for each depth, the whole model first: each lacks the layer whose removal costs least.

    Of layers whose removal costs the same the first goes. on_row: called with each row as it is found.
    Raises: DataError if the whole model's loss is not finite.
    """
    layers = tuple(range(source.num_layers))
    exits = network.losses_by_exit(held_out.batches, source.path(layers))
    if not math.isfinite(exits[-1]):
        raise DataError(f"the held-out loss of {source.label} is {exits[-1]}: it has weights that are not finite.")
    rows = [DepthRow(layers, 1.0, exits[-1], exits[-1])]
    on_row(rows[0])
    while len(layers) > max(1, down_to):
        scale = source.residual_scale(len(layers) - 1)
        path = LayerPath(layers, source.num_layers, residual_scale=scale)
        losses = network.losses_without_each(held_out.batches, path)
        finite = [loss if math.isfinite(loss) else math.inf for loss in losses]
        removed = finite.index(min(finite))
        layers = layers[:removed] + layers[removed + 1 :]
        rows.append(DepthRow(layers, scale, losses[removed], exits[len(layers) - 1]))
        on_row(rows[-1])
    return rows


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
