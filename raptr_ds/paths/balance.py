"""Balance: how many layers of a path each pipeline stage gets, so that the slowest stage is as light as possible.

The fullest stage sets a pipeline's pace. So the counts first make the largest load (active layers plus the fixed cost
of embedding or head, in layers) as small as it can be; what freedom is left makes the free layers' probabilities of
being active as equal as possible. The two goals contradict each other where fixed layers or the head take room in
some stages only: 24 layers in 4 stages at length 12, first and last fixed, give 3 layers a stage, which is 2 of 5 free
layers at the ends (0.4) and 3 of 6 in the middle (0.5). Balance wins: no path has a heavier slowest stage than it must.
Where a fixed layer and the head fill all that a stage may hold, its free layers are never active at that length;
marginals say so (balanced_marginals), and a run and tools/plan.py print it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from raptr_ds.paths.stages import stage_layers

_TOLERANCE = 1e-9  # of a layer, for comparing loads


@dataclass(frozen=True)
class BalancedStages:
    """The stages that paths are balanced over.

    num_layers: layers of each stage, in order. head_cost: what the last stage does besides, in units of one layer.
    """

    num_layers: tuple[int, ...]
    head_cost: float = 0.0

    def layers(self) -> list[range]:
        """Return each stage's layers, 0-based and global."""
        return stage_layers(self.num_layers)


@lru_cache(maxsize=1024)
def mean_counts(stages: BalancedStages, fixed_layers: tuple[int, ...], path_length: int) -> tuple[Fraction, ...]:
    """Return the expected number of active free layers of each stage, exactly, on paths of path_length layers.

    A stage may hold what keeps its load at the least possible maximum. Under that cap all free layers get the same
    probability (water-filling), which is the fairest choice: none could get more but at the cost of one with less.
    """
    fixed = [sum(layer in layers for layer in fixed_layers) for layers in stages.layers()]
    free = [count - f for count, f in zip(stages.num_layers, fixed, strict=True)]
    wanted = path_length - len(fixed_layers)
    assert 0 <= wanted <= sum(free), f"path_length={path_length}, {len(fixed_layers)} of {sum(stages.num_layers)} fixed"
    caps = [most - f for most, f in zip(_most_active(stages, fixed, path_length), fixed, strict=True)]
    return tuple(_water_filled(caps, free, wanted))


def systematic_counts(means: Sequence[Fraction], order: Sequence[int], offset: Fraction) -> list[int]:
    """Return a count for each stage by systematic sampling: its mean rounded up or down, all with one sum.

    From `offset` on the means are laid end to end, in `order`, a permutation of the stages; each stage's count is that
    of the whole numbers on its part, the end included. offset: uniform over the multiples of one over the means' common
    denominator from 0 to less than 1, so that a count is its mean in expectation.
    """
    counts, end = [0] * len(means), offset
    for stage in order:
        start, end = end, end + means[stage]
        counts[stage] = math.floor(end) - math.floor(start)
    return counts


def _most_active(stages: BalancedStages, fixed: Sequence[int], path_length: int) -> list[int]:
    """Return the most layers of each stage that keep the load of the fullest one as small as it can be."""
    costs = (*(0.0 for _ in fixed[1:]), stages.head_cost)
    sizes = list(zip(stages.num_layers, fixed, costs, strict=True))
    least = max(f + cost for _, f, cost in sizes)
    loads = {count + cost for num_layers, f, cost in sizes for count in range(f, num_layers + 1)}
    for limit in sorted(load for load in loads if load >= least):
        most = [min(num_layers, math.floor(limit - cost + _TOLERANCE)) for num_layers, _, cost in sizes]
        if sum(most) >= path_length:
            return most
    raise AssertionError(f"{path_length} layers do not fit into {stages}")


def _water_filled(caps: Sequence[int], room: Sequence[int], total: int) -> list[Fraction]:
    """Return min(cap, level * room) of each stage, the level such that they add up to total."""
    # Stages in the order in which a rising level fills them: a stage is full at level cap / room.
    order = sorted((s for s in range(len(room)) if room[s]), key=lambda s: Fraction(caps[s], room[s]))
    shares = [Fraction(0)] * len(room)
    left, room_left = Fraction(total), sum(room)
    for stage in order:
        shares[stage] = min(Fraction(caps[stage]), left / room_left * room[stage])
        left -= shares[stage]
        room_left -= room[stage]
    assert left == 0, f"{total} do not fit into {caps}"
    return shares


def balanced_marginals(stages: BalancedStages, fixed_layers: tuple[int, ...], path_length: int) -> np.ndarray:
    """Return each layer's probability of being in a balanced path, (num_layers,) float64: closed form, exact.

    It is 1 for a fixed layer, else the expected number of active free layers of its stage over all its free layers:
    within a stage all subsets of one size are equally likely.
    """
    means = mean_counts(stages, fixed_layers, path_length)
    marginals = []
    for layers, mean in zip(stages.layers(), means, strict=True):
        free = sum(layer not in fixed_layers for layer in layers)
        marginals += [1.0 if layer in fixed_layers else float(mean / free) for layer in layers]
    return np.array(marginals)


def draw_balanced(
    generator: np.random.Generator, stages: BalancedStages, path_length: int, fixed_layers: tuple[int, ...]
) -> tuple[int, ...]:
    """Return exactly path_length layers: the fixed ones, and in each stage its count of free ones, drawn uniformly.

    Over a single stage this is uniform sampling.
    """
    means = mean_counts(stages, fixed_layers, path_length)
    num_layers = sum(stages.num_layers)
    fixed = set(fixed_layers)
    free = [layer for layer in range(num_layers) if layer not in fixed]
    keys = dict(zip(free, generator.random(len(free)).tolist(), strict=True))
    order = np.argsort(generator.random(len(stages.num_layers)), kind="stable").tolist()
    denominator = math.lcm(*(mean.denominator for mean in means))
    offset = Fraction(int(generator.random() * denominator), denominator)
    path = list(fixed_layers)
    for layers, count in zip(stages.layers(), systematic_counts(means, order, offset), strict=True):
        path += sorted((layer for layer in layers if layer in keys), key=keys.__getitem__)[:count]
    return tuple(sorted(path))
