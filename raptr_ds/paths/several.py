"""Several paths in one step: each is taken by an equal share of the step's micro batches."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from raptr_ds.paths.path import LayerPath
from raptr_ds.paths.phased import Phased
from raptr_ds.paths.protocol import PathMethod
from raptr_ds.rng import stream_key


@dataclass(frozen=True)
class SeveralPaths(Phased):
    """Methods that differ by their seed alone; each draws one of a step's paths."""

    draws: tuple[PathMethod, ...]

    def path_at(self, step: int) -> LayerPath:
        """Return the path of a 0-based step, with a share for each draw."""
        return LayerPath.of_shares([method.path_at(step) for method in self.draws])

    def expected_length_at(self, step: int) -> float:
        """Return the expected work of a step in whole layers: that of each draw."""
        return self.draws[0].expected_length_at(step)

    def expected_layers_from(self, step: int) -> float:
        """Return the sum of the expected lengths of this step and all later ones."""
        return self.draws[0].expected_layers_from(step)

    def marginals_at(self, step: int) -> np.ndarray:
        """Return each layer's exact probability of being in one draw of a step, (num_layers,) float64."""
        return self.draws[0].marginals_at(step)


def several_paths(build: Callable[[int], PathMethod], seed: int, paths_per_step: int) -> PathMethod:
    """Return the method that draws so many paths for a step, each as `build` of another seed draws it.

    build: of a seed. The first draw has the run's own seed: one path for each step is `build(seed)` itself.
    """
    draws = [build(seed if draw == 0 else stream_key(seed, "draw", draw)) for draw in range(paths_per_step)]
    return draws[0] if len(draws) == 1 else SeveralPaths(draws[0].phases, draws[0].num_layers, tuple(draws))
