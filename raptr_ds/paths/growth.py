"""Growth: the layers that a stacked model gets, where they are put, and what they begin with."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Growth:
    """The layers `before` exist; those of `after` that are new among them are put on top or in the middle.

    Layers are known by their places in the full model, which they have from the start, so that none ever moves: a layer
    that does not exist yet is the identity. init: what the new layers begin with, as raptr_ds.path.growth_init.
    copies_optimizer_state: the optimizer state of what they are copies of comes along, step counts included; else it
    begins afresh.
    Source: Reddi et al. 2023 (gradual stacking), Gong et al. 2019 (doubling), Saunshi et al. 2024 (the middle).
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    position: str = "top"
    init: str = "copied"
    copies_optimizer_state: bool = True

    def __post_init__(self) -> None:
        assert set(self.before) < set(self.after), self
        assert self.before or self.init != "copied", "there is nothing to copy"
        assert self.init == "copied" or not self.copies_optimizer_state, self

    @property
    def new_layers(self) -> tuple[int, ...]:
        """The new layers, in their order."""
        return tuple(sorted(set(self.after) - set(self.before)))

    @property
    def sources(self) -> dict[int, int]:
        """The layer that each new layer is a copy of, new layers in their order; none where they are no copies.

        They are copies of the block of as many layers that they are put behind, over again where there are fewer: on
        top of 6, 3 copy layers 3-5 and 6 copy layers 0-5; in the middle of 6, 3 copy layers 0-2.
        """
        if self.init != "copied":
            return {}
        first, end = _block(len(self.before), len(self.after), self.position)
        block = self.before[first:end]
        return {layer: block[number % len(block)] for number, layer in enumerate(self.new_layers)}


def layers_of_phases(lengths: Sequence[int], position: str) -> tuple[tuple[int, ...], ...]:
    """Return the layers that a stacked model has in each phase, by their places in the last one's model.

    lengths: layers of each phase, never fewer than before.
    """
    layers = tuple(range(lengths[-1]))
    phases = [layers]
    for before in reversed(lengths[:-1]):
        _, end = _block(before, len(layers), position)
        layers = layers[:end] + layers[end + len(layers) - before :]
        phases.append(layers)
    return tuple(reversed(phases))


def _block(before: int, after: int, position: str) -> tuple[int, int]:
    """Return (first, end) of the block, among `before` layers, that new ones are put behind.

    A block has as many layers as are new, or all. In the middle it is block ceil(n / 2) of n, counted from 1.
    """
    size = min(before, after - before)
    if position == "top" or not size:
        return before - size, before
    first = (before - size) // (2 * size) * size
    return first, first + size
