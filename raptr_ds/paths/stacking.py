"""Stacking: train some layers alone, then put new ones on top or in the middle, until the model has its full depth."""

from dataclasses import dataclass
from functools import cached_property

from raptr_ds.config.path_sections import StackingSection
from raptr_ds.paths.baselines import FullPaths
from raptr_ds.paths.growth import Growth, layers_of_phases
from raptr_ds.paths.path import LayerPath


@dataclass(frozen=True)
class Stacking(FullPaths):
    """Growing models: gradual stacking (6-9-12), progressive stacking, which doubles (3-6-12), MIDAS, one expansion.

    Each phase trains the layers that the model has by then and no others. After a growth the learning rate rises again
    over growth_warmup_steps steps, linearly, from nothing to the run's schedule; with 0 it follows the schedule alone.
    Source: Reddi et al. 2023; Gong et al. 2019; Saunshi et al. 2024 (MIDAS); Bu 2025, arXiv 2511.04981.
    """

    section: StackingSection

    @cached_property
    def layers(self) -> tuple[tuple[int, ...], ...]:
        """The layers of each phase, by their places in the full model."""
        return layers_of_phases([phase.fixed_length for phase in self.phases], self.section.growth_position)

    def model_at(self, step: int) -> LayerPath:
        """Return the path through the layers that the model has at a step."""
        phase = self.phase_at(step)
        return LayerPath(self.layers[phase.index], self.num_layers, phase.index)

    def growth_at(self, step: int) -> Growth | None:
        """Return how the model grows before a step, None where it does not.

        Growing again is harmless: a run that resumes at this step has a checkpoint from before the growth.
        """
        if not 0 < step < self.num_steps:
            return None
        before, after = self.model_at(step - 1).layers, self.model_at(step).layers
        if before == after:
            return None
        section = self.section
        copies_state = section.growth_optimizer_state == "copied"
        return Growth(before, after, section.growth_position, section.growth_init, copies_state)

    def learning_rate_factor_at(self, step: int) -> float:
        """Return the share of the schedule's learning rate at a step: less than 1 while it rises after a growth."""
        grown = [phase.first_step for phase in self.phases if self.growth_at(phase.first_step)]
        warmup = self.section.growth_warmup_steps
        since = min((step - first for first in grown if first <= step), default=warmup)
        return min(1.0, (since + 1) / warmup) if warmup else 1.0
