"""What a run asks of a path method, and what all methods have in common."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from raptr_ds.config.path_sections import PathSection, RunSizes
from raptr_ds.paths.growth import Growth
from raptr_ds.paths.path import LayerPath
from raptr_ds.paths.schedule import Phase, phase_at, phases_of


@dataclass(frozen=True)
class PathMethod(ABC):
    """A path section, completed and checked, in a run of these sizes: phases over its steps, and a path for each.

    Steps are 0-based, and every answer is a pure function of (seed, step).
    """

    section: PathSection
    sizes: RunSizes
    seed: int

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        """The phases over the steps of the run, in order."""
        return phases_of(self.section, self.sizes)

    @property
    def num_layers(self) -> int:
        """Layers of the full model."""
        return self.sizes.num_layers

    @property
    def num_steps(self) -> int:
        """Steps of the run."""
        return self.sizes.num_steps

    @abstractmethod
    def path_at(self, step: int) -> LayerPath:
        """Return the path of a step."""

    @abstractmethod
    def marginals_at(self, step: int) -> np.ndarray:
        """Return each layer's exact probability of being in the path of a step, (num_layers,) float64.

        Where layers run in parts, the share of each that runs. They add up to the expected work of the step.
        """

    def expected_layers_from(self, step: int) -> float:
        """Return the expected work of this step and all later ones, in whole layers; cheap, in closed form.

        This is the sum of the expected numbers of active layers, unless layers run in parts.
        """
        return float(sum(phase.fixed_length * phase.steps_from(step) for phase in self.phases))

    def phase_at(self, step: int) -> Phase:
        """Return the phase of a step; the last one for a step beyond the end."""
        return phase_at(self.phases, step)

    def model_at(self, step: int) -> LayerPath:
        """Return the path through all layers that the model has at a step: every layer, unless it still grows."""
        return LayerPath.full(self.num_layers, self.phase_at(step).index)

    def growth_at(self, step: int) -> Growth | None:
        """Return how the model grows before a step, None where it does not; growing again changes nothing."""
        return None

    def learning_rate_factor_at(self, step: int) -> float:
        """Return what the schedule's learning rate is multiplied by at a step."""
        return 1.0
