"""Plan: each phase's FLOPs, time and memory, compared with the standard run; nothing is launched."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from raptr_ds.paths.path import LayerPath
from raptr_ds.paths.protocol import PathMethod
from raptr_ds.paths.schedule import Phase
from raptr_ds.planner.memory import RankMemory
from raptr_ds.planner.peak import Peak, phase_peak, phase_setting, run_peak
from raptr_ds.planner.step_time import Layout, Setting, step_seconds

_SAMPLED_STEPS = 64  # of a phase, whose paths stand for all of it


@dataclass(frozen=True)
class PhasePlan:
    """One phase of a run: per-step values are means over its paths; peak is the fullest rank's, at its worst path.

    path_length: active layers. width: the share of each that runs.
    """

    phase: Phase
    path_length: float
    width: float
    step_flops: float
    step_seconds: float
    peak: Peak

    @property
    def layout(self) -> Layout:
        """The layout with the phase's micro batch, and recomputation as at the peak."""
        return self.peak.setting.layout

    @property
    def memory(self) -> RankMemory:
        """What the fullest rank holds at the peak."""
        return self.peak.memory


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
    phases = [phase for phase in method.phases if phase.num_steps]
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
    length = expected / phase.num_steps if phase.path_length is None else float(phase.path_length)
    flops = setting.steps.phase_flops(method, phase, phase.first_step, setting.num_predicted) / phase.num_steps
    here = phase_setting(method, phase, setting)
    seconds = float(step_seconds(paths, here).total.mean())
    width = 1.0 if here.width is None else here.width
    return PhasePlan(phase, length, width, flops, seconds, phase_peak(method, phase, setting))


def keepable_layers(method: PathMethod, setting: Setting, memory_bytes: float) -> int | None:
    """Return up to how many active layers on any pipeline stage a run may keep activations of, in a rank's memory.

    setting: with recomputation. None if the run does not fit, whatever is recomputed.
    """
    assert setting.layout.recompute, setting
    stage_layers = setting.layout.stage_layers
    for count in range(max(stage_layers), -1, -1):
        kept = replace(setting, keep_up_to=count)
        peaks = [Peak.along(kept, stage, min(count, layers)) for stage, layers in enumerate(stage_layers)]
        if max(peak.memory.total for peak in (*peaks, run_peak(method, kept))) <= memory_bytes:
            return count
    return None


def propose_schedule(
    num_layers: int, least_length: int, saving: float, saved_by: Callable[[tuple[int, ...]], float]
) -> tuple[int, ...] | None:
    """Return four path lengths, the last the full depth, of the run whose saving of FLOPs is nearest to `saving`.

    least_length: of a path, at least the fixed layers; saved_by: returns the saving of a run with these lengths. The
    lengths grow as evenly as possible; None if no schedule comes as near as the smallest step of lengths allows.
    """
    found = {lengths: saved_by(lengths) for lengths in even_schedules(num_layers, least_length)}
    best = min(found, key=lambda lengths: (round(abs(found[lengths] - saving), 9), _unevenness(lengths)))
    finest = saved_by((num_layers - 1, num_layers, num_layers, num_layers)) if num_layers > least_length else 0.0
    return best if abs(found[best] - saving) <= max(finest, 1e-9) else None


def even_schedules(num_layers: int, least_length: int) -> list[tuple[int, ...]]:
    """Return the schedules of four path lengths that grow to the full depth by steps as equal as possible."""
    found: dict[tuple[int, ...], None] = {}
    for reach in range(num_layers - least_length + 1):
        even = [num_layers - round(reach * share / 3) for share in (3, 2, 1)]
        for second in (0, -1, 1):
            for third in (0, -1, 1):
                lengths = (even[0], even[1] + second, even[2] + third, num_layers)
                if lengths[0] >= least_length and list(lengths) == sorted(lengths):
                    found[lengths] = None
    return list(found)


def _unevenness(lengths: Sequence[int]) -> int:
    """Return how far the lengths are from growing by equal steps: the sum of the squared differences of the steps."""
    steps = [after - before for before, after in pairwise(lengths)]
    return sum((after - before) ** 2 for before, after in pairwise(steps))
