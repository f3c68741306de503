"""From the run file's path section to a path method: a pure function from step to path."""

from dataclasses import dataclass

import numpy as np

from raptr_ds.config.path_sections import (
    AnyPathSection,
    ConstantSection,
    FullSection,
    LayerDropoutSection,
    LayerDropSection,
    PldSection,
    RaptrSection,
    RunSizes,
    StackingSection,
    WidthSection,
)
from raptr_ds.paths.balance import BalancedStages
from raptr_ds.paths.baselines import FullPaths, LayerDrop, LayerDropout, ProgressiveLayerDropping
from raptr_ds.paths.path import LayerPath
from raptr_ds.paths.protocol import PathMethod
from raptr_ds.paths.raptr import RandomPaths
from raptr_ds.paths.stacking import Stacking
from raptr_ds.paths.width import RandomParts
from raptr_ds.rng import stream_key


def build_path_method(
    section: AnyPathSection, sizes: RunSizes, seed: int, stages: BalancedStages | None = None
) -> PathMethod:
    """Return the method of a completed and checked section; `stages` are what balanced sampling balances."""
    # The first draw has the run's own seed, so that it does not depend on how many there are.
    seeds = [seed, *(stream_key(seed, "draw", draw) for draw in range(1, section.paths_per_step))]
    draws = tuple(_one_path(section, sizes, seed, stages) for seed in seeds)
    return draws[0] if len(draws) == 1 else SeveralPaths(section, sizes, seed, draws)


def _one_path(section: AnyPathSection, sizes: RunSizes, seed: int, stages: BalancedStages | None) -> PathMethod:
    match section:
        case FullSection():
            return FullPaths(section, sizes, seed)
        case RaptrSection(width_schedule=str()):
            return RandomParts(section, sizes, seed, RandomPaths(section, sizes, seed, stages))
        case RaptrSection() | ConstantSection():
            return RandomPaths(section, sizes, seed, stages)
        case PldSection():
            return ProgressiveLayerDropping(section, sizes, seed)
        case LayerDropoutSection():
            return LayerDropout(section, sizes, seed)
        case LayerDropSection():
            return LayerDrop(section, sizes, seed)
        case StackingSection():
            return Stacking(section, sizes, seed)
        case WidthSection():
            return RandomParts(section, sizes, seed, FullPaths(section, sizes, seed))


@dataclass(frozen=True)
class SeveralPaths(PathMethod):
    """Several paths in one step, each taken by an equal share of its micro batches.

    draws: methods that differ by their seed alone; each draws one of a step's paths.
    """

    draws: tuple[PathMethod, ...]

    def path_at(self, step: int) -> LayerPath:
        """Return the path of a 0-based step, with a share for each draw."""
        return LayerPath.of_shares([method.path_at(step) for method in self.draws])

    def expected_layers_from(self, step: int) -> float:
        """Return the expected work of this step and all later ones, in whole layers: that of each draw."""
        return self.draws[0].expected_layers_from(step)

    def marginals_at(self, step: int) -> np.ndarray:
        """Return each layer's exact probability of being in one draw of a step, (num_layers,) float64."""
        return self.draws[0].marginals_at(step)
