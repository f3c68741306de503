"""A path: the layers that run in one step, as an immutable value that ranks can compare."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Parts:
    """The parts that run of each layer: attention heads, and as many blocks of the MLP's inner features.

    number: heads of a layer. heads, blocks: for each layer of the model, 0-based, strictly increasing; none of a layer
    that is skipped.
    """

    number: int
    heads: tuple[tuple[int, ...], ...]
    blocks: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        assert len(self.heads) == len(self.blocks), self
        for parts in (*self.heads, *self.blocks):
            assert all(a < b for a, b in zip((-1, *parts), (*parts, self.number), strict=True)), parts

    @property
    def work(self) -> float:
        """What these parts cost, in whole layers: heads and blocks by the share of them that runs."""
        return sum(map(len, (*self.heads, *self.blocks))) / (2 * self.number)


@dataclass(frozen=True)
class LayerPath:
    """The active layers of one training step; every other layer is the identity.

    Its repr holds all of it, in plain Python numbers: ranks compare digests of that.
    layers: 0-based global indices, strictly increasing. phase: 0-based index of the schedule's phase, for metrics.
    residual_scale: factor on the output of each active residual branch. A path may be empty (a Bernoulli draw can be).
    layer_scales: such a factor for each layer of the model, where layers differ; empty: residual_scale for all.
    parts: what runs of each layer; None for all of it.
    shares: where a step takes several paths, those, each taken by an equal share of its micro batches; `layers` are
    then all that are active in any of them, which is what the optimizer moves. See `of_shares`.
    """

    layers: tuple[int, ...]
    num_layers: int
    phase: int = 0
    residual_scale: float = 1.0
    parts: Parts | None = None
    shares: tuple["LayerPath", ...] = ()
    layer_scales: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        assert self.num_layers >= 1, f"num_layers={self.num_layers}"
        assert all(a < b for a, b in zip(self.layers, self.layers[1:], strict=False)), f"not increasing: {self.layers}"
        assert not self.layers or (self.layers[0] >= 0 and self.layers[-1] < self.num_layers), (
            f"layers {self.layers} outside 0..{self.num_layers - 1}"
        )
        assert 0.0 < self.residual_scale < float("inf"), f"residual_scale={self.residual_scale}"
        assert len(self.layer_scales) in (0, self.num_layers), self.layer_scales
        assert all(0.0 < scale < float("inf") for scale in self.layer_scales), self.layer_scales
        if self.parts is not None:
            idle = set(range(self.num_layers)) - set(self.layers)
            assert len(self.parts.heads) == self.num_layers, "parts of some layers"
            assert not any(self.parts.heads[layer] or self.parts.blocks[layer] for layer in idle), "parts of no layer"

    @classmethod
    def full(cls, num_layers: int, phase: int = 0) -> "LayerPath":
        """Return the path through every layer, with residual scale 1."""
        return cls(tuple(range(num_layers)), num_layers, phase)

    @classmethod
    def of_shares(cls, shares: Sequence["LayerPath"]) -> "LayerPath":
        """Return the path of a step whose micro batches take these, of one model and phase, in equal shares."""
        active = {layer for share in shares for layer in share.layers}
        return cls(tuple(sorted(active)), shares[0].num_layers, shares[0].phase, shares=tuple(shares))

    @property
    def draws(self) -> tuple["LayerPath", ...]:
        """The paths that the step's micro batches take, in equal shares: this one alone, where it has no shares."""
        return self.shares or (self,)

    def of_micro_batch(self, index: int, count: int) -> "LayerPath":
        """Return the path of micro batch `index` (0-based) of `count`, a multiple of the number of draws."""
        assert count % len(self.draws) == 0, f"{len(self.draws)} paths for {count} micro batches"
        return self.draws[index * len(self.draws) // count]

    @property
    def length(self) -> int:
        """The number of active layers."""
        return len(self.layers)

    @property
    def mean_length(self) -> float:
        """The mean number of layers that a micro batch goes through."""
        return sum(share.length for share in self.shares) / len(self.shares) if self.shares else self.length

    @property
    def work(self) -> float:
        """What the layers cost, in whole layers: their number where they run whole, of several paths the mean."""
        return self.mean_length if self.parts is None else self.parts.work

    def is_active(self, layer: int) -> bool:
        """Return whether the layer of this 0-based global index runs."""
        return layer in self.layers

    def scale_of(self, layer: int) -> float:
        """Return the factor on the residual branches of an active layer."""
        return self.layer_scales[layer] if self.layer_scales else self.residual_scale

    def active_in(self, layers: Iterable[int]) -> tuple[int, ...]:
        """Return those of `layers` (a pipeline stage's range, say) that are active, in their order."""
        active = set(self.layers)
        return tuple(layer for layer in layers if layer in active)
