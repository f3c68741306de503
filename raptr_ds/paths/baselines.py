"""Baselines on the same terms as RaPTr: the full model at each step, LayerDrop, and progressive layer dropping."""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np

from raptr_ds.config.path_sections import LayerDropSection, PldSection, RunSizes
from raptr_ds.paths.path import LayerPath
from raptr_ds.paths.protocol import PathMethod
from raptr_ds.paths.raptr import residual_scale_of
from raptr_ds.paths.schedule import one_phase
from raptr_ds.rng import stream


@dataclass(frozen=True)
class FullPaths(PathMethod):
    """Standard training: every layer at each step."""

    @classmethod
    def from_section(cls, sizes: RunSizes) -> Self:
        """Return the method of a run."""
        return cls(one_phase(sizes.num_layers, sizes.num_steps), sizes.num_layers)

    def marginals_at(self, step: int) -> np.ndarray:
        """Return one for every layer, (num_layers,) float64."""
        self.phase_at(step)
        return np.ones(self.num_layers)

    def path_at(self, step: int) -> LayerPath:
        """Return the full path."""
        return self.model_at(step)


@dataclass(frozen=True)
class LayerDrop(PathMethod):
    """LayerDrop: every layer is dropped independently with one probability, from the first step to the last.

    A path without layers is drawn again, so that a layer runs with probability (1 - p) / (1 - p^L).
    Source: Fan, Grave and Joulin 2020, arXiv 1909.11556.
    """

    seed: int
    drop_probability: float
    residual_scale: str = "none"

    def __post_init__(self) -> None:
        assert 0.0 <= self.drop_probability < 1.0, f"drop_probability={self.drop_probability}"

    @classmethod
    def from_section(cls, section: LayerDropSection, sizes: RunSizes, seed: int) -> Self:
        """Return the method of a completed section."""
        assert section.layerdrop is not None
        phases = one_phase(None, sizes.num_steps)
        return cls(phases, sizes.num_layers, seed, section.layerdrop, section.residual_scale)

    def marginals_at(self, step: int) -> np.ndarray:
        """Return the probability that each layer runs, at any step, (num_layers,) float64."""
        self.phase_at(step)
        drop = self.drop_probability
        return np.full(self.num_layers, (1.0 - drop) / (1.0 - drop**self.num_layers))

    def expected_layers_from(self, step: int) -> float:
        """Return the sum of the expected path lengths of this step and all later ones."""
        return float(self.marginals_at(0).sum()) * max(0, self.num_steps - step)

    def path_at(self, step: int) -> LayerPath:
        """Return the path of a 0-based step, a pure function of (seed, step)."""
        phase, generator = self.phase_at(step), stream(self.seed, "path", step)
        layers: tuple[int, ...] = ()
        while not layers:
            kept = generator.random(self.num_layers) >= self.drop_probability
            layers = tuple(np.flatnonzero(kept).tolist())
        scale = residual_scale_of(self.residual_scale, len(layers), self.num_layers)
        return LayerPath(layers, self.num_layers, phase.index, scale)


@dataclass(frozen=True)
class ProgressiveLayerDropping(PathMethod):
    """Progressive layer dropping: deeper layers are dropped more often, and all more often as time goes on.

    Layer i (0-based, so layer 0 is always kept and no path is empty) is kept at step t with probability
    1 - i/L (1 - theta(t)), where theta(t) = (1 - theta) exp(-gamma t) + theta. The paper's further scaling of each
    branch by its own keep probability is not applied; residual_scale is this repository's one rule for all methods.
    Source: Zhang and He 2020, arXiv 2010.13369.
    """

    seed: int
    gamma: float = 0.001
    theta: float = 0.5
    residual_scale: str = "none"

    def __post_init__(self) -> None:
        assert 0.0 <= self.theta <= 1.0, f"theta={self.theta}"
        assert self.gamma > 0.0, f"gamma={self.gamma}"

    @classmethod
    def from_section(cls, section: PldSection, sizes: RunSizes, seed: int) -> Self:
        """Return the method of a section."""
        phases = one_phase(None, sizes.num_steps)
        return cls(phases, sizes.num_layers, seed, section.pld_gamma, section.pld_theta, section.residual_scale)

    def marginals_at(self, step: int) -> np.ndarray:
        """Return the probability that each layer runs at a 0-based step, (num_layers,) float64."""
        theta = (1.0 - self.theta) * math.exp(-self.gamma * step) + self.theta
        return 1.0 - np.arange(self.num_layers) / self.num_layers * (1.0 - theta)

    def expected_layers_from(self, step: int) -> float:
        """Return the sum of the expected path lengths of this step and all later ones.

        The mean of i/L over the layers is (L - 1) / 2L, and the exponentials of theta(t) form a geometric series.
        """
        steps_left = max(0, self.num_steps - step)
        if steps_left == 0:
            return 0.0
        exponentials = math.exp(-self.gamma * step) * math.expm1(-self.gamma * steps_left) / math.expm1(-self.gamma)
        dropped = (self.num_layers - 1) / 2 * (1.0 - self.theta) * (steps_left - exponentials)
        return self.num_layers * steps_left - dropped

    def path_at(self, step: int) -> LayerPath:
        """Return the path of a 0-based step, a pure function of (seed, step)."""
        phase = self.phase_at(step)
        uniforms = stream(self.seed, "path", step).random(self.num_layers)
        layers = tuple(np.flatnonzero(uniforms < self.marginals_at(step)).tolist())
        scale = residual_scale_of(self.residual_scale, len(layers), self.num_layers)
        return LayerPath(layers, self.num_layers, phase.index, scale)
