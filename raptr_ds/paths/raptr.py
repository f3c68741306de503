"""RaPTr: at each step a random path whose length follows the schedule's phases."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from raptr_ds.config.path_sections import DrawingSection, RandomSection
from raptr_ds.paths.balance import BalancedStages, balanced_marginals, draw_balanced
from raptr_ds.paths.path import LayerPath
from raptr_ds.paths.protocol import PathMethod
from raptr_ds.rng import stream


@dataclass(frozen=True)
class DrawnPaths(PathMethod):
    """Methods that draw the layers of each step."""

    section: DrawingSection

    @abstractmethod
    def draw(self, generator: np.random.Generator, step: int) -> tuple[int, ...]:
        """Return the layers of a 0-based step."""

    def path_at(self, step: int) -> LayerPath:
        """Return the path of a 0-based step, a pure function of (seed, step), with the factors on its branches.

        Under `inverse` a branch is divided by its layer's probability of being drawn, so that what it adds to the
        stream is in expectation what it adds in the full model; the other rules are those of `residual_scale_of`. A
        layer that is never drawn needs no factor.
        """
        layers = self.draw(stream(self.seed, "path", step), step)
        num_layers, phase, rule = self.num_layers, self.phase_at(step).index, self.section.residual_scale
        if rule == "inverse":
            marginals = self.marginals_at(step)
            scales = tuple((1.0 / np.where(marginals > 0.0, marginals, 1.0)).tolist())
            return LayerPath(layers, num_layers, phase, layer_scales=() if set(scales) == {1.0} else scales)
        return LayerPath(layers, num_layers, phase, residual_scale_of(rule, len(layers), num_layers))


@dataclass(frozen=True)
class RandomPaths(DrawnPaths):
    """Random paths by phases: RaPTr with a schedule's phases, constant-rate depth with a single phase.

    path_at is a pure function of (seed, step): every rank computes the same path, and resuming needs the step alone.
    stages: what balanced sampling balances.
    Source: Panigrahi et al., arXiv 2402.05913 (docs/ on what is open).
    """

    section: RandomSection
    stages: BalancedStages | None = None

    def __post_init__(self) -> None:
        assert self.section.sampling != "balanced" or self.stages is not None
        assert self.stages is None or sum(self.stages.num_layers) == self.num_layers

    @cached_property
    def balanced_over(self) -> BalancedStages:
        """The stages that paths are balanced over; a single one, which is uniform sampling, unless it is balanced."""
        if self.section.sampling == "balanced" and self.stages is not None:
            return self.stages
        return BalancedStages((self.num_layers,))

    @cached_property
    def fixed_layers(self) -> tuple[int, ...]:
        """The layers in every path, 0-based, sorted."""
        return self.section.fixed_in(self.num_layers)

    def marginals_at(self, step: int) -> np.ndarray:
        """Return each layer's exact probability of being in the path of a 0-based step, (num_layers,) float64."""
        return balanced_marginals(self.balanced_over, self.fixed_layers, self.phase_at(step).fixed_length)

    def draw(self, generator: np.random.Generator, step: int) -> tuple[int, ...]:
        """Return the layers of a 0-based step: of the phase's length, in expectation under Bernoulli sampling."""
        length = self.phase_at(step).fixed_length
        if length == self.num_layers:
            return tuple(range(length))
        if self.section.sampling == "bernoulli":
            return draw_bernoulli(generator, self.marginals_at(step), self.fixed_layers)
        return draw_balanced(generator, self.balanced_over, length, self.fixed_layers)


def draw_uniform(generator: np.random.Generator, number: int, count: int) -> tuple[int, ...]:
    """Return `count` of the numbers 0..number-1 in order, drawn uniformly without replacement."""
    # The order of uniform keys is a uniform permutation. Generator.choice could change between NumPy versions
    # (NEP 19), and with it the paths of a resumed run; plain uniform numbers are the stable part of its stream.
    order = np.argsort(generator.random(number), kind="stable")
    return tuple(sorted(order[:count].tolist()))


def draw_bernoulli(
    generator: np.random.Generator, marginals: np.ndarray, fixed_layers: tuple[int, ...]
) -> tuple[int, ...]:
    """Return the fixed layers and each free one with its probability. Without fixed layers a path can be empty."""
    free = np.delete(np.arange(len(marginals)), fixed_layers)
    drawn = free[generator.random(free.size) < marginals[free]]
    return tuple(sorted((*fixed_layers, *drawn.tolist())))


def residual_scale_of(rule: str, path_length: int, num_layers: int) -> float:
    """Return the factor on each active residual branch: 1 for none, sqrt(L / k) for sqrt, L / k for inverse.

    k is the path's actual length, which under Bernoulli sampling differs from the scheduled one. Reason: in a
    pre-layer-norm network at initialization the residual stream's norm grows like the square root of its depth.
    An empty path has no branch to scale and gets 1.
    """
    if rule == "none" or not path_length:
        return 1.0
    return num_layers / path_length if rule == "inverse" else math.sqrt(num_layers / path_length)
