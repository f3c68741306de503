"""What a run asks of a path method."""

from typing import Protocol

import numpy as np

from raptr_ds.paths.growth import Growth
from raptr_ds.paths.path import LayerPath
from raptr_ds.paths.schedule import Phase, Phases


class PathMethod(Protocol):
    """What a run asks of a method; steps are 0-based, and every answer is a pure function of (seed, step)."""

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        ...

    @property
    def num_steps(self) -> int:
        """Steps of the run."""
        ...

    @property
    def phases(self) -> Phases:
        """The run's phases."""
        ...

    def phase_at(self, step: int) -> Phase:
        """Return the phase of a step."""
        ...

    def path_at(self, step: int) -> LayerPath:
        """Return the path of a step."""
        ...

    def model_at(self, step: int) -> LayerPath:
        """Return the path through all layers that the model has at a step: every layer, unless it still grows."""
        ...

    def growth_at(self, step: int) -> Growth | None:
        """Return how the model grows before a step, None where it does not; growing again changes nothing."""
        ...

    def learning_rate_factor_at(self, step: int) -> float:
        """Return what the schedule's learning rate is multiplied by at a step."""
        ...

    def expected_length_at(self, step: int) -> float:
        """Return the expected work of a step in whole layers: the expected number of active ones, unless in parts."""
        ...

    def expected_layers_from(self, step: int) -> float:
        """Return the sum of the expected lengths of this step and all later ones; cheap, in closed form."""
        ...

    def marginals_at(self, step: int) -> np.ndarray:
        """Return each layer's exact probability of being in the path of a step, (num_layers,) float64.

        Where layers run in parts, the share of each that runs.
        """
        ...
