"""Baselines on the same terms as RaPTr: the full model at each step, LayerDrop, and dropping that follows the depth."""

import math
from abc import abstractmethod
from dataclasses import dataclass

import numpy as np

from raptr_ds.config.path_sections import LayerDropoutSection, LayerDropSection, PldSection
from raptr_ds.paths.path import LayerPath
from raptr_ds.paths.protocol import PathMethod
from raptr_ds.paths.raptr import DrawnPaths


@dataclass(frozen=True)
class FullPaths(PathMethod):
    """Standard training: every layer that the model has, at each step."""

    def path_at(self, step: int) -> LayerPath:
        """Return the path through all layers that the model has at a step."""
        return self.model_at(step)

    def marginals_at(self, step: int) -> np.ndarray:
        """Return one for each layer that the model has at a step, zero for the others, (num_layers,) float64."""
        return np.isin(np.arange(self.num_layers), self.model_at(step).layers).astype(np.float64)


@dataclass(frozen=True)
class LayerDrop(DrawnPaths):
    """LayerDrop: every layer is dropped independently with one probability, from the first step to the last.

    A path without layers is drawn again, so that a layer runs with probability (1 - p) / (1 - p^L).
    Source: Fan, Grave and Joulin 2020, arXiv 1909.11556.
    """

    section: LayerDropSection

    def marginals_at(self, step: int) -> np.ndarray:
        """Return the probability that each layer runs, at any step, (num_layers,) float64."""
        drop = self.section.layerdrop
        return np.full(self.num_layers, (1.0 - drop) / (1.0 - drop**self.num_layers))

    def expected_layers_from(self, step: int) -> float:
        """Return the sum of the expected path lengths of this step and all later ones."""
        return float(self.marginals_at(0).sum()) * max(0, self.num_steps - step)

    def draw(self, generator: np.random.Generator, step: int) -> tuple[int, ...]:
        """Return the layers of a 0-based step, at least one."""
        layers: tuple[int, ...] = ()
        while not layers:
            kept = generator.random(self.num_layers) >= self.section.layerdrop
            layers = tuple(np.flatnonzero(kept).tolist())
        return layers


@dataclass(frozen=True)
class DepthDropping(DrawnPaths):
    """Layers are dropped independently, the deeper the more often, at a rate that changes with time.

    Layer i is kept at step t with probability 1 - d_i r(t): d_i grows linearly with depth from 0, so that layer 0 is
    always kept and no path is empty.
    """

    @abstractmethod
    def depth_shares(self) -> np.ndarray:
        """Return d_i of each layer, (num_layers,) float64."""

    @abstractmethod
    def drop_rate_at(self, step: int) -> float:
        """Return r(t) of a 0-based step."""

    @abstractmethod
    def drop_rates_from(self, step: int) -> float:
        """Return the sum of r(t) over this step and all later ones, in closed form."""

    def marginals_at(self, step: int) -> np.ndarray:
        """Return the probability that each layer runs at a 0-based step, (num_layers,) float64."""
        return 1.0 - self.depth_shares() * self.drop_rate_at(step)

    def expected_layers_from(self, step: int) -> float:
        """Return the sum of the expected path lengths of this step and all later ones."""
        steps_left = max(0, self.num_steps - step)
        dropped = float(self.depth_shares().sum()) * self.drop_rates_from(step) if steps_left else 0.0
        return self.num_layers * steps_left - dropped

    def draw(self, generator: np.random.Generator, step: int) -> tuple[int, ...]:
        """Return the layers of a 0-based step."""
        uniforms = generator.random(self.num_layers)
        return tuple(np.flatnonzero(uniforms < self.marginals_at(step)).tolist())


@dataclass(frozen=True)
class ProgressiveLayerDropping(DepthDropping):
    """Progressive layer dropping: deeper layers are dropped more often, and all more often as time goes on.

    Layer i is kept at step t with probability 1 - i/L (1 - theta(t)), where theta(t) = (1 - theta) exp(-gamma t) +
    theta. The paper also divides each branch by its keep probability, which is residual_scale inverse.
    Source: Zhang and He 2020, arXiv 2010.13369.
    """

    section: PldSection

    def depth_shares(self) -> np.ndarray:
        """Return i/L of each layer, (num_layers,) float64."""
        return np.arange(self.num_layers) / self.num_layers

    def drop_rate_at(self, step: int) -> float:
        """Return 1 - theta(t) of a 0-based step."""
        gamma, theta = self.section.pld_gamma, self.section.pld_theta
        return 1.0 - ((1.0 - theta) * math.exp(-gamma * step) + theta)

    def drop_rates_from(self, step: int) -> float:
        """Return the sum over this step and all later ones: the exponentials of theta(t) form a geometric series."""
        gamma, steps_left = self.section.pld_gamma, self.num_steps - step
        exponentials = math.exp(-gamma * step) * math.expm1(-gamma * steps_left) / math.expm1(-gamma)
        return (1.0 - self.section.pld_theta) * (steps_left - exponentials)


@dataclass(frozen=True)
class LayerDropout(DepthDropping):
    """Layer dropout that ends: deeper layers are dropped more often, and all less often as time goes on, to never.

    Layer i of L is dropped at step t of T with probability p i/(L - 1) (1 - t/T): the last one with p at first.
    Source: Elhoushi et al. 2026, arXiv 2609.05275 (docs/methods.md says what is second-hand).
    """

    section: LayerDropoutSection

    def depth_shares(self) -> np.ndarray:
        """Return i/(L - 1) of each layer, 0 of a single one, (num_layers,) float64."""
        return np.arange(self.num_layers) / max(1, self.num_layers - 1)

    def drop_rate_at(self, step: int) -> float:
        """Return the last layer's rate at a 0-based step; 0 beyond the end."""
        return self.section.layer_dropout * max(0, self.num_steps - step) / self.num_steps

    def drop_rates_from(self, step: int) -> float:
        """Return the sum over this step and all later ones, of which n have rates of 1/T to n/T of the first."""
        steps_left = self.num_steps - step
        return self.section.layer_dropout * steps_left * (steps_left + 1) / 2 / self.num_steps
