"""What a run asks of a path method, and what all methods have in common."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from raptr_ds.paths.growth import Growth
from raptr_ds.paths.path import LayerPath
from raptr_ds.paths.schedule import Phase, Phases


@dataclass(frozen=True)
class PathMethod(ABC):
    """Phases over the steps of a run on a model of num_layers layers, and a path for each step.

    Steps are 0-based, and every answer is a pure function of (seed, step).
    """

    phases: Phases
    num_layers: int

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
        phases = self.phases.phases
        return float(sum(phase.fixed_length * phase.steps_from(step) for phase in phases))

    @property
    def num_steps(self) -> int:
        """The number of steps that the phases cover."""
        return self.phases.num_steps

    def phase_at(self, step: int) -> Phase:
        """Return the phase of a step."""
        return self.phases.at(step)

    def model_at(self, step: int) -> LayerPath:
        """Return the path through all layers that the model has at a step: every layer, unless it still grows."""
        return LayerPath.full(self.num_layers, self.phase_at(step).index)

    def growth_at(self, step: int) -> Growth | None:
        """Return how the model grows before a step, None where it does not; growing again changes nothing."""
        return None

    def learning_rate_factor_at(self, step: int) -> float:
        """Return what the schedule's learning rate is multiplied by at a step."""
        return 1.0
