"""Phases: which path length holds at which step, from the lengths of a schedule such as "6-8-10-12"."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from raptr_ds.config.path_sections import (
    ConstantSection,
    FullSection,
    PathSection,
    RunSizes,
    ScheduledSection,
    WarmedUpSection,
)
from raptr_ds.config.schedules import steps_of_phases


@dataclass(frozen=True)
class Phase:
    """Consecutive steps first_step <= step < end_step (0-based) with one path length in expectation.

    path_length: expected number of active layers; None where a method changes it inside the phase.
    """

    index: int
    path_length: int | None
    first_step: int
    end_step: int

    @property
    def num_steps(self) -> int:
        """The number of steps; may be 0 in a run with fewer steps than phases."""
        return self.end_step - self.first_step

    @property
    def fixed_length(self) -> int:
        """The path length of a phase that has one."""
        assert self.path_length is not None, f"the path length changes within {self}"
        return self.path_length

    def steps_from(self, step: int) -> int:
        """Return how many of the phase's steps are `step` or later."""
        return max(0, self.end_step - max(self.first_step, step))


def phase_at(phases: Sequence[Phase], step: int) -> Phase:
    """Return the phase of a 0-based step; the last one for a step beyond the end."""
    assert step >= 0, step
    return phases[bisect_right(phases, step, key=lambda phase: phase.first_step) - 1]


def phases_of(section: PathSection, sizes: RunSizes) -> tuple[Phase, ...]:
    """Return the phases of a completed section's schedule, or a single one over all steps for methods without one.

    Together they cover the steps of the run exactly, in order.
    """
    num_layers, num_steps = sizes.num_layers, sizes.num_steps
    if isinstance(section, ScheduledSection):
        warmup = section.full_warmup_steps if isinstance(section, WarmedUpSection) else 0
        phases = split_phases(section.phase_lengths, num_layers, num_steps, section.split, warmup)
        if section.parts == "layers":
            return phases
        return tuple(replace(phase, path_length=num_layers) for phase in phases)  # a schedule of heads
    if isinstance(section, FullSection):
        length = num_layers
    else:
        length = section.constant_length if isinstance(section, ConstantSection) else None
    return (Phase(0, length, 0, num_steps),)


def split_phases(
    lengths: Sequence[int],
    num_layers: int,
    num_steps: int,
    split: str | Sequence[float] = "uniform",
    full_warmup_steps: int = 0,
) -> tuple[Phase, ...]:
    """Divide a run's steps among a full-model warm-up, if any, and the schedule's phases.

    The warm-up is a phase of its own before the schedule's, and no longer than the run.
    """
    warmup_steps = min(full_warmup_steps, num_steps)
    phases = [Phase(0, num_layers, 0, warmup_steps)] if warmup_steps else []
    first_step = warmup_steps
    for length, count in zip(lengths, steps_of_phases(lengths, num_steps - warmup_steps, split), strict=True):
        phases.append(Phase(len(phases), length, first_step, first_step + count))
        first_step += count
    return tuple(phases)
