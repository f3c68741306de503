"""Growth: which trained layers the new ones of a stacked model are copied from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Growth:
    """The first num_layers_before layers exist; those up to num_layers_after are put on top of them.

    The new layers are copies of the topmost ones, in their order and over again where there are fewer: growing from 6
    to 9 copies layers 3-5, from 6 to 12 layers 0-5. copies_optimizer_state: their optimizer state comes along, step
    counts included; else it begins afresh.
    Source: Reddi et al. 2023 (gradual stacking), Gong et al. 2019 (doubling).
    """

    num_layers_before: int
    num_layers_after: int
    copies_optimizer_state: bool = True

    def __post_init__(self) -> None:
        assert 0 < self.num_layers_before < self.num_layers_after, self

    @property
    def sources(self) -> dict[int, int]:
        """The layer that each new layer is a copy of, new layers in their order; 0-based."""
        before = self.num_layers_before
        block = min(before, self.num_layers_after - before)
        new = range(before, self.num_layers_after)
        return {layer: before - block + (layer - before) % block for layer in new}
