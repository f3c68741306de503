"""Random widths: layers run with some of their attention heads and as many blocks of their MLP."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from raptr_ds.config.path_sections import RaptrSection, WidthSection
from raptr_ds.paths.path import LayerPath, Parts
from raptr_ds.paths.protocol import PathMethod
from raptr_ds.paths.raptr import draw_uniform, residual_scale_of
from raptr_ds.rng import stream


@dataclass(frozen=True)
class RandomParts(PathMethod):
    """Random parts of the layers of another method's paths, by phases: all layers under width, RaPTr's under raptr.

    The MLP's inner features are cut into as many blocks as there are heads. Heads and blocks of each layer are drawn
    separately, uniformly without replacement; a phase's width is the number of each. What is not drawn adds nothing to
    its branch. Depth and width are drawn apart; what a step costs is their product, and so is the factor on branches,
    of which the width's is residual_scale_of the heads.
    Source: Panigrahi et al., arXiv 2402.05913v2, which names both (docs/methods.md on what is open).
    """

    section: RaptrSection | WidthSection
    depth: PathMethod

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Active heads of each layer in each phase, all of them in a warm-up."""
        section = self.section
        widths = section.phase_widths if isinstance(section, RaptrSection) else section.phase_lengths
        return (self.sizes.num_heads,) * (len(self.phases) - len(widths)) + widths

    def path_at(self, step: int) -> LayerPath:
        """Return the path of a step, a pure function of (seed, step)."""
        path, generator = self.depth.path_at(step), stream(self.seed, "width", step)
        width, num_heads = self.widths[path.phase], self.sizes.num_heads
        drawn = [[draw_uniform(generator, num_heads, width) for _ in range(self.num_layers)] for _ in range(2)]
        heads, blocks = (
            tuple(chosen if path.is_active(layer) else () for layer, chosen in enumerate(of_layers))
            for of_layers in drawn
        )
        scale = residual_scale_of(self.section.residual_scale, width, num_heads)
        return replace(
            path,
            residual_scale=path.residual_scale * scale,
            layer_scales=tuple(of_layer * scale for of_layer in path.layer_scales),
            parts=Parts(num_heads, heads, blocks),
        )

    def marginals_at(self, step: int) -> np.ndarray:
        """Return the share of each layer that runs at a step in expectation, (num_layers,) float64."""
        return self.depth.marginals_at(step) * self.widths[self.phase_at(step).index] / self.sizes.num_heads

    def expected_layers_from(self, step: int) -> float:
        """Return the work of this step and all later ones in whole layers."""
        phases = zip(self.widths, self.phases, strict=True)
        heads = sum(width * phase.fixed_length * phase.steps_from(step) for width, phase in phases)
        return heads / self.sizes.num_heads
