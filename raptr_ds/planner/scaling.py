"""Scaling: simulated speed-ups of shorter paths on longer pipelines and more ranks, for each sampling."""

from collections.abc import Sequence

import numpy as np

from raptr_ds.config.path_sections import ConstantSection, RunSizes
from raptr_ds.paths.balance import BalancedStages
from raptr_ds.paths.methods import build_path_method
from raptr_ds.paths.path import LayerPath
from raptr_ds.planner.simulator import pipeline_seconds
from raptr_ds.planner.step_time import active_in_stages, activity_table


def sampled_paths(
    sampling: str, path_length: int, stage_layers: Sequence[int], num_paths: int, head_cost: float = 0.0
) -> list[LayerPath]:
    """Return random paths of a model whose first and last layer are fixed; balanced ones over these stages."""
    num_layers = sum(stage_layers)
    section = ConstantSection.model_validate({"constant_length": path_length, "sampling": sampling})
    stages = BalancedStages(tuple(stage_layers), head_cost)
    method = build_path_method(section, RunSizes(num_layers, num_paths), seed=1, stages=stages)
    return [method.path_at(step) for step in range(num_paths)]


def pipeline_speed_up(
    sampling: str,
    path_length: int,
    stage_layers: Sequence[int],
    num_micro_batches: int,
    *,
    num_chunks: int = 1,
    num_paths: int = 200,
) -> float:
    """Return the full path's time over the mean time of random paths, for layers alone and free transfers.

    stage_layers: layers of each stage; with num_chunks > 1 each of these is cut into as many interleaved parts, and
    must divide by it. Balanced paths are balanced over the parts.
    """
    parts = tuple(count // num_chunks for count in stage_layers for _ in range(num_chunks))
    assert sum(parts) == sum(stage_layers), f"{stage_layers} do not divide by {num_chunks}"
    paths = sampled_paths(sampling, path_length, parts, num_paths)
    active = active_in_stages(activity_table([LayerPath.full(sum(parts)), *paths]), parts)
    schedule = "interleaved" if num_chunks > 1 else "1f1b"
    times = pipeline_seconds(active, 2 * active, num_micro_batches, num_chunks=num_chunks, schedule=schedule)
    seconds = times.max(axis=-1)
    return float(seconds[0] / np.mean(seconds[1:]))
