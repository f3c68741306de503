"""Which layers to keep: evenly spaced ones, or what is left when those that cost least held-out loss are removed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from raptr_ds.depth.held_out import HeldOut
from raptr_ds.depth.network import Network
from raptr_ds.depth.source import ModelSource
from raptr_ds.errors import DataError
from raptr_ds.paths.path import LayerPath


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
