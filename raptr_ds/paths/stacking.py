"""Stacking: train some layers alone, then put new ones on top or in the middle, until the model has its full depth."""

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np

from raptr_ds.config.path_sections import RunSizes, StackingSection
from raptr_ds.paths.growth import Growth, layers_of_phases
from raptr_ds.paths.path import LayerPath
from raptr_ds.paths.protocol import PathMethod
from raptr_ds.paths.schedule import split_phases


@dataclass(frozen=True)
class Stacking(PathMethod):
    """Growing models: gradual stacking (6-9-12), progressive stacking, which doubles (3-6-12), MIDAS, one expansion.

    Each phase trains the layers that the model has by then and no others; position, init and copies_optimizer_state
    are those of Growth. After a growth the learning rate rises again over warmup_steps steps, linearly, from nothing
    to the run's schedule; with 0 it follows the schedule alone.
    Source: Reddi et al. 2023; Gong et al. 2019; Saunshi et al. 2024 (MIDAS); Bu 2025, arXiv 2511.04981.
    """

    position: str = "top"
    init: str = "copied"
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
        position, init = section.growth_position, section.growth_init
        copies = section.growth_optimizer_state == "copied"
        return cls(phases, sizes.num_layers, position, init, copies, section.growth_warmup_steps)

    @cached_property
    def layers(self) -> tuple[tuple[int, ...], ...]:
        """The layers of each phase, by their places in the full model."""
        return layers_of_phases([phase.fixed_length for phase in self.phases.phases], self.position)

    def path_at(self, step: int) -> LayerPath:
        """Return the path of a step: all layers that the model has by then."""
        return self.model_at(step)

    def model_at(self, step: int) -> LayerPath:
        """Return the path through the layers that the model has at a step."""
        phase = self.phase_at(step)
        return LayerPath(self.layers[phase.index], self.num_layers, phase.index)

    def marginals_at(self, step: int) -> np.ndarray:
        """Return one for each layer that the model has at a step, zero for the others, (num_layers,) float64."""
        return np.isin(np.arange(self.num_layers), self.model_at(step).layers).astype(np.float64)

    def growth_at(self, step: int) -> Growth | None:
        """Return how the model grows before a step, None where it does not.

        Growing again is harmless: a run that resumes at this step has a checkpoint from before the growth.
        """
        if not 0 < step < self.num_steps:
            return None
        before, after = self.model_at(step - 1).layers, self.model_at(step).layers
        if before == after:
            return None
        return Growth(before, after, self.position, self.init, self.copies_optimizer_state)

    def learning_rate_factor_at(self, step: int) -> float:
        """Return the share of the schedule's learning rate at a step: less than 1 while it rises after a growth."""
        grown = [phase.first_step for phase in self.phases.phases if self.growth_at(phase.first_step)]
        since = min((step - first for first in grown if first <= step), default=self.warmup_steps)
        return min(1.0, (since + 1) / self.warmup_steps) if self.warmup_steps else 1.0
