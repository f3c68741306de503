"""Layers over pipeline stages."""

import pytest

from raptr_ds.config.derive import derive_pipeline_layers
from raptr_ds.paths.stages import stage_layers


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "counts"),
    [(8, 1, [8]), (8, 2, [4, 4]), (5, 2, [3, 2]), (7, 3, [2, 3, 2]), (10, 4, [2, 3, 3, 2]), (3, 3, [1, 1, 1])],
)
def test_layers_are_spread_evenly_the_middle_first(num_layers: int, num_stages: int, counts: list[int]) -> None:
    stages = stage_layers(derive_pipeline_layers(num_layers, num_stages))
    assert [len(stage) for stage in stages] == counts
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))


def test_given_counts_are_kept() -> None:
    assert stage_layers([1, 5]) == [range(1), range(1, 6)]
