"""Random widths: layers run with some of their attention heads and as many blocks of their MLP."""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from raptr_ds.config.path_sections import RaptrSection, RunSizes, WidthSection
from raptr_ds.paths.balance import BalancedStages
from raptr_ds.paths.path import LayerPath, Parts
from raptr_ds.paths.protocol import PathMethod
from raptr_ds.paths.raptr import RandomPaths, draw_uniform, residual_scale_of
from raptr_ds.paths.schedule import Phases, split_phases
from raptr_ds.rng import stream


@dataclass(frozen=True)
class RandomWidths(PathMethod):
    """Random parts by phases: RaPTr's schedule over the heads of each layer instead of the layers.

    The MLP's inner features are cut into as many blocks as there are heads. Heads and blocks of each layer are drawn
    separately, uniformly without replacement; a phase's width is the number of each. What is not drawn adds nothing to
    its branch.
    residual_scale sqrt multiplies branches by sqrt(heads / active heads).
    Source: the generalization of RaPTr from layers to parts of them.
    """

    seed: int
    num_heads: int
    widths: tuple[int, ...]
    residual_scale: str = "none"

    def __post_init__(self) -> None:
        assert len(self.widths) == len(self.phases.phases), (self.widths, self.phases)
        assert all(1 <= width <= self.num_heads for width in self.widths), self.widths

    @classmethod
    def from_section(cls, section: WidthSection, sizes: RunSizes, seed: int) -> Self:
        """Return the method of a completed section; its schedule counts heads, the method's phases layers."""
        num_layers, num_heads = sizes.num_layers, sizes.num_heads
        warmup = section.full_warmup_steps
        by_heads = split_phases(section.phase_lengths, num_heads, sizes.num_steps, section.split, warmup).phases
        phases = Phases(tuple(replace(phase, path_length=num_layers) for phase in by_heads))
        widths = tuple(phase.fixed_length for phase in by_heads)
        return cls(phases, num_layers, seed, num_heads, widths, section.residual_scale)

    def width_at(self, step: int) -> int:
        """Return the active heads of each layer at a step."""
        return self.widths[self.phase_at(step).index]

    def path_at(self, step: int) -> LayerPath:
        """Return the path of a step, a pure function of (seed, step)."""
        width, generator = self.width_at(step), stream(self.seed, "width", step)
        heads, blocks = (
            tuple(draw_uniform(generator, self.num_heads, width, ()) for _ in range(self.num_layers)) for _ in range(2)
        )
        scale = residual_scale_of(self.residual_scale, width, self.num_heads)
        layers = tuple(range(self.num_layers))
        parts = Parts(self.num_heads, heads, blocks)
        return LayerPath(layers, self.num_layers, self.phase_at(step).index, scale, parts)

    def marginals_at(self, step: int) -> np.ndarray:
        """Return the share of each layer that runs at a step, (num_layers,) float64."""
        return np.full(self.num_layers, self.width_at(step) / self.num_heads)

    def expected_layers_from(self, step: int) -> float:
        """Return the work of this step and all later ones in whole layers."""
        phases = zip(self.widths, self.phases.phases, strict=True)
        heads = sum(width * phase.steps_from(step) for width, phase in phases)
        return self.num_layers * heads / self.num_heads


@dataclass(frozen=True)
class RandomParts(PathMethod):
    """Random parts in depth and width: RaPTr's paths, of whose layers some heads and blocks run.

    The two are drawn apart, in the same phases. What a step costs is their product, and so is the factor on branches.
    Source: Panigrahi et al., arXiv 2402.05913v2, which names both (docs/methods.md on what is open).
    """

    depth: RandomPaths
    width: RandomWidths

    @classmethod
    def from_section(cls, section: RaptrSection, sizes: RunSizes, seed: int, stages: BalancedStages | None) -> Self:
        """Return the method of a completed section that has widths."""
        depth = RandomPaths.from_section(section, sizes, seed, stages)
        num_warmups = len(depth.phases.phases) - len(section.phase_widths)
        widths = (sizes.num_heads,) * num_warmups + section.phase_widths
        width = RandomWidths(depth.phases, sizes.num_layers, seed, sizes.num_heads, widths, section.residual_scale)
        return cls(depth.phases, sizes.num_layers, depth, width)

    def path_at(self, step: int) -> LayerPath:
        """Return the path of a step, a pure function of (seed, step)."""
        path, whole = self.depth.path_at(step), self.width.path_at(step)
        assert whole.parts is not None
        heads, blocks = (
            tuple(chosen if path.is_active(layer) else () for layer, chosen in enumerate(drawn))
            for drawn in (whole.parts.heads, whole.parts.blocks)
        )
        return replace(
            path,
            residual_scale=path.residual_scale * whole.residual_scale,
            layer_scales=tuple(scale * whole.residual_scale for scale in path.layer_scales),
            parts=Parts(whole.parts.number, heads, blocks),
        )

    def marginals_at(self, step: int) -> np.ndarray:
        """Return the share of each layer that runs at a step in expectation, (num_layers,) float64."""
        return self.depth.marginals_at(step) * self.width.width_at(step) / self.width.num_heads

    def expected_layers_from(self, step: int) -> float:
        """Return the work of this step and all later ones in whole layers."""
        phases = zip(self.width.widths, self.phases.phases, strict=True)
        heads = sum(width * phase.fixed_length * phase.steps_from(step) for width, phase in phases)
        return heads / self.width.num_heads
