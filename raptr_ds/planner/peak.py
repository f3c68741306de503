"""Peak: the most that a rank holds, over all phases of a run and all paths that these can draw."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from raptr_ds.paths.balance import mean_counts
from raptr_ds.paths.methods import SeveralPaths
from raptr_ds.paths.protocol import PathMethod
from raptr_ds.paths.raptr import RandomPaths
from raptr_ds.paths.schedule import Phase
from raptr_ds.paths.stages import stage_layers
from raptr_ds.paths.width import RandomParts
from raptr_ds.planner.memory import RankMemory, rank_memory
from raptr_ds.planner.step_time import Setting


@dataclass(frozen=True)
class Peak:
    """A rank of a pipeline stage along a path with num_active of the stage's layers.

    setting: with the micro batch, the width and the recomputation of that moment. num_trained: layers with gradients,
    which are more where a step has several paths.
    """

    setting: Setting
    stage: int
    num_active: int
    num_trained: int

    @classmethod
    def along(cls, setting: Setting, stage: int, num_active: int, num_trained: int | None = None) -> "Peak":
        """Return what a rank holds along such a path, with recomputation where the model recomputes it."""
        recompute = setting.layout.recompute and num_active > setting.keep_up_to
        setting = replace(setting, layout=replace(setting.layout, recompute=recompute))
        return cls(setting, stage, num_active, num_active if num_trained is None else num_trained)

    @property
    def memory(self) -> RankMemory:
        """The bytes, by kind."""
        return rank_memory(self.setting, self.stage, self.num_active, self.num_trained)


def run_peak(method: PathMethod, setting: Setting, stages: Iterable[int] | None = None) -> Peak:
    """Return the peak of a run's fullest rank, of all pipeline stages or of some."""
    stages = range(setting.layout.num_stages) if stages is None else tuple(stages)
    peaks = [phase_peak(method, phase, setting, stages) for phase in method.phases if phase.num_steps]
    return max(peaks, key=lambda peak: peak.memory.total)


def phase_peak(method: PathMethod, phase: Phase, setting: Setting, stages: Iterable[int] | None = None) -> Peak:
    """Return the peak of the fullest rank in a phase, of all pipeline stages or of some."""
    setting = phase_setting(method, phase, setting)
    layout, peaks = setting.layout, []
    num_draws = len(method.draws) if isinstance(method, SeveralPaths) else 1
    layers = stage_layers(layout.stage_layers)
    for stage in range(layout.num_stages) if stages is None else stages:
        least, most = active_range(method, phase, layers[stage])
        trained = min(layout.stage_layers[stage], num_draws * most)
        counts = {most}
        if layout.recompute and least <= setting.keep_up_to < most:
            counts.add(setting.keep_up_to)  # the longest path that nothing is recomputed on
        peaks += [Peak.along(setting, stage, count, trained if num_draws > 1 else count) for count in sorted(counts)]
    return max(peaks, key=lambda peak: peak.memory.total)


def phase_setting(method: PathMethod, phase: Phase, setting: Setting) -> Setting:
    """Return the setting with a phase's micro batch and width."""
    layout = setting.layout
    if setting.micro_batches:
        size = setting.micro_batches[phase.index]
        layout = replace(layout, micro_batch=size, num_micro_batches=layout.sequences_per_rank // size)
    width = method.widths[phase.index] / method.sizes.num_heads if isinstance(method, RandomParts) else None
    return replace(setting, layout=layout, width=width)


def active_range(method: PathMethod, phase: Phase, layers: range) -> tuple[int, int]:
    """Return the fewest and the most of some layers, such as a pipeline stage's, that a path of a phase can have.

    phase: with steps. No path of the phase is outside, whether or not the run's seed draws one at the ends.
    """
    method = method.draws[0] if isinstance(method, SeveralPaths) else method
    method = method.depth if isinstance(method, RandomParts) else method
    marginals = [method.marginals_at(step) for step in (phase.first_step, phase.end_step - 1)]
    sure, possible = np.min(marginals, axis=0) == 1.0, np.max(marginals, axis=0) > 0.0
    least, most = int(sure[layers].sum()), int(possible[layers].sum())
    if not isinstance(method, RandomPaths) or method.section.sampling == "bernoulli":
        return least, most
    length = phase.fixed_length
    ranges = [
        (least, most),
        (length - (int(possible.sum()) - most), length - (int(sure.sum()) - least)),
        _balanced_range(method, length, layers),
    ]
    return max(first for first, _ in ranges), min(last for _, last in ranges)


def _balanced_range(method: RandomPaths, length: int, layers: range) -> tuple[int, int]:
    """Return the fewest and the most of some layers that balanced paths can have, by what each stage gets."""
    fixed, stages = set(method.fixed_layers), method.balanced_over
    means = mean_counts(stages, method.fixed_layers, length)
    least = most = 0
    for stage, mean in zip(stages.layers(), means, strict=True):
        shared = set(stage).intersection(layers)
        free, all_free = len(shared - fixed), len(set(stage) - fixed)
        least += len(shared & fixed) + max(0, math.floor(mean) - (all_free - free))
        most += len(shared & fixed) + min(free, math.ceil(mean))
    return least, most
