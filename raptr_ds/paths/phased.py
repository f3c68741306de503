"""What all path methods have in common: a model's layers, and phases of steps."""

from dataclasses import dataclass

from raptr_ds.paths.growth import Growth
from raptr_ds.paths.path import LayerPath
from raptr_ds.paths.schedule import Phase, Phases


@dataclass(frozen=True)
class Phased:
    """Phases over the steps of a run on a model of num_layers layers; steps are 0-based."""

    phases: Phases
    num_layers: int

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
        """Return how the model grows before a step: here it never does."""
        return None

    def learning_rate_factor_at(self, step: int) -> float:
        """Return what the schedule's learning rate is multiplied by at a step: here 1."""
        return 1.0
