"""Plan: each phase's FLOPs, time and memory, compared with the standard run; nothing is launched."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from raptr_ds.paths.path import LayerPath
from raptr_ds.paths.protocol import PathMethod
from raptr_ds.paths.schedule import Phase
from raptr_ds.planner.memory import RankMemory, rank_memory
from raptr_ds.planner.step_time import Layout, Setting, active_in_stages, activity_table, step_seconds

_SAMPLED_STEPS = 64  # of a phase, whose paths stand for all of it


@dataclass(frozen=True)
class PhasePlan:
    """One phase of a run: per-step values are means over its paths; memory is the fullest rank's, at its worst path."""

    phase: Phase
    path_length: float
    layout: Layout
    step_flops: float
    step_seconds: float
    fullest_stage: int
    memory: RankMemory


@dataclass(frozen=True)
class RunPlan:
    """A run's phases that have steps, and one step of the standard run for comparison."""

    phases: tuple[PhasePlan, ...]
    full_step_flops: float
    full_step_seconds: float

    @property
    def num_steps(self) -> int:
        """Steps of the run."""
        return sum(plan.phase.num_steps for plan in self.phases)

    @property
    def flops(self) -> float:
        """Executed FLOPs of the whole run."""
        return sum(plan.phase.num_steps * plan.step_flops for plan in self.phases)

    @property
    def seconds(self) -> float:
        """Predicted time of the whole run's steps."""
        return sum(plan.phase.num_steps * plan.step_seconds for plan in self.phases)

    @property
    def flops_saved(self) -> float:
        """Fraction of the standard run's FLOPs that is not executed."""
        return 1 - self.flops / (self.num_steps * self.full_step_flops)

    @property
    def seconds_saved(self) -> float:
        """Fraction of the standard run's time that is saved."""
        return 1 - self.seconds / (self.num_steps * self.full_step_seconds)

    @property
    def peak_bytes(self) -> float:
        """Memory of the fullest rank in any phase."""
        return max(plan.memory.total for plan in self.phases)


def plan_run(method: PathMethod, setting: Setting) -> RunPlan:
    """Return the plan of a run."""
    full = LayerPath.full(method.num_layers)
    phases = [phase for phase in method.phases.phases if phase.num_steps]
    return RunPlan(
        tuple(_plan_phase(method, phase, setting) for phase in phases),
        setting.flops(method.num_layers),
        float(step_seconds([full], setting).total[0]),
    )


def _plan_phase(method: PathMethod, phase: Phase, setting: Setting) -> PhasePlan:
    num_sampled = min(phase.num_steps, _SAMPLED_STEPS)
    steps = [phase.first_step + number * phase.num_steps // num_sampled for number in range(num_sampled)]
    paths = [method.path_at(step) for step in steps]
    expected = method.expected_layers_from(phase.first_step) - method.expected_layers_from(phase.end_step)
    length = expected / phase.num_steps
    draws = [draw for path in paths for draw in path.draws]
    layout = setting.layout
    if setting.micro_batches:
        size = setting.micro_batches[phase.index]
        number = layout.micro_batch * layout.num_micro_batches // size
        layout = replace(layout, micro_batch=size, num_micro_batches=number)
    most_active = int(active_in_stages(activity_table(draws), layout.stage_layers).max())
    layout = replace(layout, recompute=layout.recompute and most_active > setting.keep_up_to)
    setting = replace(setting, layout=layout)
    stage, memory = fullest_rank(draws, setting)
    seconds = float(step_seconds(paths, setting).total.mean())
    return PhasePlan(phase, length, layout, setting.flops(length), seconds, stage, memory)


def fullest_rank(paths: Sequence[LayerPath], setting: Setting) -> tuple[int, RankMemory]:
    """Return the pipeline stage whose ranks hold most along any of the paths, and what they hold."""
    most = active_in_stages(activity_table(paths), setting.layout.stage_layers).max(axis=0)
    held = [rank_memory(setting, stage, int(count)) for stage, count in enumerate(most)]
    stage = int(np.argmax([memory.total for memory in held]))
    return stage, held[stage]


def keepable_layers(setting: Setting, memory_bytes: float) -> int:
    """Return up to how many active layers on any pipeline stage fit into a rank's memory without recomputation."""
    setting = replace(setting, layout=replace(setting.layout, recompute=False))
    stage_layers = setting.layout.stage_layers
    for count in range(max(stage_layers), 0, -1):
        if max(rank_memory(setting, stage, count).total for stage in range(len(stage_layers))) <= memory_bytes:
            return count
    return 0


def propose_schedule(
    num_layers: int, least_length: int, saving: float, saved_by: Callable[[tuple[int, ...]], float]
) -> tuple[int, ...] | None:
    """Return four path lengths, the last the full depth, of the run whose saving of FLOPs is nearest to `saving`.

    least_length: of a path, at least the fixed layers; saved_by: returns the saving of a run with these lengths. The
    lengths grow as evenly as possible; None if no schedule comes as near as the smallest step of lengths allows.
    """
    found: dict[tuple[int, ...], float] = {}
    for reach in range(num_layers - least_length + 1):
        even = [num_layers - round(reach * share / 3) for share in (3, 2, 1)]
        for second in (0, -1, 1):
            for third in (0, -1, 1):
                lengths = (even[0], even[1] + second, even[2] + third, num_layers)
                if lengths[0] >= least_length and list(lengths) == sorted(lengths):
                    found.setdefault(lengths, saved_by(lengths))
    best = min(found, key=lambda lengths: (round(abs(found[lengths] - saving), 9), _unevenness(lengths)))
    finest = saved_by((num_layers - 1, num_layers, num_layers, num_layers)) if num_layers > least_length else 0.0
    return best if abs(found[best] - saving) <= max(finest, 1e-9) else None


def _unevenness(lengths: Sequence[int]) -> int:
    """Return how far the lengths are from growing by equal steps: the sum of the squared differences of the steps."""
    steps = [after - before for before, after in pairwise(lengths)]
    return sum((after - before) ** 2 for before, after in pairwise(steps))
