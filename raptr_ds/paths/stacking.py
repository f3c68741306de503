"""Stacking: train the first layers alone, then put copies of them on top, until the model has its full depth."""

from dataclasses import dataclass
from typing import Self

import numpy as np

from raptr_ds.config.path_sections import RunSizes, StackingSection
from raptr_ds.paths.growth import Growth
from raptr_ds.paths.path import LayerPath
from raptr_ds.paths.protocol import PathMethod
from raptr_ds.paths.schedule import split_phases


@dataclass(frozen=True)
class Stacking(PathMethod):
    """Gradual stacking (6-9-12) and progressive stacking, which doubles (3-6-12): the schedule is all that differs.

    Each phase trains its first path_length layers and no others. After a growth the learning rate rises again over
    warmup_steps steps, linearly, from nothing to the run's schedule; with 0 it follows the schedule alone.
    Source: Reddi et al. 2023; Gong et al. 2019.
    """

    copies_optimizer_state: bool = True
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        assert self.warmup_steps >= 0, f"warmup_steps={self.warmup_steps}"
        lengths = [phase.fixed_length for phase in self.phases.phases]
        assert lengths == sorted(lengths), f"path lengths {lengths} shrink"

    @classmethod
    def from_section(cls, section: StackingSection, sizes: RunSizes) -> Self:
        """Return the method of a completed section."""
        phases = split_phases(section.phase_lengths, sizes.num_layers, sizes.num_steps, section.split)
        copies = section.growth_optimizer_state == "copied"
        return cls(phases, sizes.num_layers, copies, section.growth_warmup_steps)

    def path_at(self, step: int) -> LayerPath:
        """Return the path of a step: all layers that the model has by then."""
        return self.model_at(step)

    def model_at(self, step: int) -> LayerPath:
        """Return the path through the layers that the model has at a step."""
        phase = self.phase_at(step)
        return LayerPath(tuple(range(phase.fixed_length)), self.num_layers, phase.index)

    def marginals_at(self, step: int) -> np.ndarray:
        """Return one for each layer that the model has at a step, zero for the others, (num_layers,) float64."""
        return (np.arange(self.num_layers) < self.phase_at(step).fixed_length).astype(np.float64)

    def growth_at(self, step: int) -> Growth | None:
        """Return how the model grows before a step, None where it does not.

        Growing again is harmless: a run that resumes at this step has a checkpoint from before the growth.
        """
        if not 0 < step < self.num_steps:
            return None
        before, after = self.phase_at(step - 1).fixed_length, self.phase_at(step).fixed_length
        return Growth(before, after, self.copies_optimizer_state) if before < after else None

    def learning_rate_factor_at(self, step: int) -> float:
        """Return the share of the schedule's learning rate at a step: less than 1 while it rises after a growth."""
        grown = [phase.first_step for phase in self.phases.phases if self.growth_at(phase.first_step)]
        since = min((step - first for first in grown if first <= step), default=self.warmup_steps)
        return min(1.0, (since + 1) / self.warmup_steps) if self.warmup_steps else 1.0
