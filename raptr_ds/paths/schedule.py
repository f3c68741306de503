"""Phases: which path length holds at which step, derived from a schedule such as "6-8-10-12"."""

import re
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from raptr_ds.errors import ConfigError, nearest

SPLITS = ("uniform", "proportional")


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


@dataclass(frozen=True)
class Phases:
    """The phases of a run in order, covering steps 0..num_steps-1 exactly."""

    phases: tuple[Phase, ...]

    def __post_init__(self) -> None:
        assert self.phases
        assert self.phases[0].first_step == 0
        for before, after in zip(self.phases, self.phases[1:], strict=False):
            assert before.end_step == after.first_step
            assert after.index == before.index + 1

    @property
    def num_steps(self) -> int:
        """The number of steps that the phases cover."""
        return self.phases[-1].end_step

    @property
    def boundaries(self) -> tuple[int, ...]:
        """The first step of every phase but the first."""
        return tuple(phase.first_step for phase in self.phases[1:])

    def at(self, step: int) -> Phase:
        """Return the phase of a 0-based step; the last phase for a step beyond the end.

        Raises: ValueError for a negative step.
        """
        if step < 0:
            raise ValueError(f"step={step} is negative; steps are 0-based")
        if step >= self.num_steps:
            return self.phases[-1]
        return self.phases[bisect_right(self.phases, step, key=lambda phase: phase.first_step) - 1]


def parse_schedule(text: str) -> tuple[int, ...]:
    """Return the path lengths written in a schedule: "6-8-10-12" gives (6, 8, 10, 12).

    Raises: ConfigError if the text is not positive whole numbers joined by '-'.
    """
    if not re.fullmatch(r"\s*[1-9][0-9]*(\s*-\s*[1-9][0-9]*)*\s*", text):
        raise ConfigError(
            f"raptr_ds.path.schedule={text!r} is not a schedule. Write path lengths (whole numbers from 1) joined by "
            "'-', one per phase, for example '6-8-10-12'."
        )
    return tuple(int(part) for part in text.split("-"))


def check_lengths(lengths: Sequence[int], num_layers: int, num_fixed: int) -> None:
    """Raise ConfigError unless every path length holds the fixed layers, fits the model, and the last is full depth."""
    schedule = "-".join(map(str, lengths))
    if max(lengths) > num_layers:
        raise ConfigError(
            f"raptr_ds.path.schedule={schedule!r} asks for paths of {max(lengths)} layers; the model has "
            f"num_layers={num_layers}. Lower the schedule or raise raptr_ds.model.num_layers."
        )
    if min(lengths) < num_fixed:
        raise ConfigError(
            f"raptr_ds.path.schedule={schedule!r} asks for paths of {min(lengths)} layers; {num_fixed} layers are "
            "always in the path (raptr_ds.path.fixed_layers). Raise the schedule or fix fewer layers."
        )
    if lengths[-1] != num_layers:
        raise ConfigError(
            f"raptr_ds.path.schedule={schedule!r} ends at {lengths[-1]} layers; training must end at full depth, "
            f"num_layers={num_layers}. End the schedule with '-{num_layers}'."
        )


def split_phases(
    lengths: Sequence[int], num_layers: int, num_steps: int, split: str = "uniform", full_warmup_steps: int = 0
) -> Phases:
    """Divide a run's steps among a full-model warm-up, if any, and the schedule's phases.

    The warm-up is a phase of its own before the schedule's, and no longer than the run. The remaining R steps are
    divided by weights, 1 for each phase (uniform) or its path length (proportional: a phase of twice the length gets
    twice the steps). Phase s ends R * (w_0 + ... + w_s) / (w_0 + ... + w_last) steps after the warm-up, rounded to
    the nearest whole step, halves up; rounding the cumulative sums, not the parts, covers all steps exactly.
    Raises: ConfigError if `split` is unknown.
    """
    if split not in SPLITS:
        raise ConfigError(f"raptr_ds.path.split={split!r} must be one of {', '.join(SPLITS)}{nearest(split, SPLITS)}.")
    assert lengths
    assert num_steps >= 1, f"num_steps={num_steps}"
    assert full_warmup_steps >= 0, f"full_warmup_steps={full_warmup_steps}"
    warmup_steps = min(full_warmup_steps, num_steps)
    phases = [Phase(0, num_layers, 0, warmup_steps)] if warmup_steps else []
    weights = [1 if split == "uniform" else length for length in lengths]
    total, cumulative, first_step = sum(weights), 0, warmup_steps
    for length, weight in zip(lengths, weights, strict=True):
        cumulative += weight
        # Integer arithmetic: floor(x + 1/2), free of rounding errors at any number of steps.
        end_step = warmup_steps + (2 * (num_steps - warmup_steps) * cumulative + total) // (2 * total)
        phases.append(Phase(len(phases), length, first_step, end_step))
        first_step = end_step
    return Phases(tuple(phases))


def one_phase(path_length: int | None, num_steps: int) -> Phases:
    """Return a single phase over all steps, for methods without a schedule."""
    return Phases((Phase(0, path_length, 0, num_steps),))


def resolve_fixed_layers(fixed_layers: Collection[int], num_layers: int) -> tuple[int, ...]:
    """Return fixed layers as sorted, distinct 0-based indices; negative ones count from the end.

    Raises: ConfigError if one is outside the model.
    """
    for layer in fixed_layers:
        if not -num_layers <= layer < num_layers:
            raise ConfigError(
                f"raptr_ds.path.fixed_layers has {layer}; with num_layers={num_layers} a layer is {-num_layers}.."
                f"{num_layers - 1} (0-based, negatives count from the end). Correct or remove it."
            )
    return tuple(sorted({layer % num_layers for layer in fixed_layers}))
