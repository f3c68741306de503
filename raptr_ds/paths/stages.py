"""Pipeline stages, as the layers that each has."""

from collections.abc import Sequence
from itertools import accumulate, pairwise


def stage_layers(layers_per_stage: Sequence[int]) -> list[range]:
    """Return each pipeline stage's contiguous layers, 0-based and global, from their counts."""
    return [range(start, end) for start, end in pairwise(accumulate(layers_per_stage, initial=0))]
