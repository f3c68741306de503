"""The batch triangle: global batch = micro batch x accumulation steps x data parallel size."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raptr_ds.errors import ConfigError

GLOBAL, MICRO, ACCUMULATION = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
BATCH_KEYS = (GLOBAL, MICRO, ACCUMULATION)


@dataclass(frozen=True)
class BatchGeometry:
    """How one step's sequences are cut up; all counts are sequences but `accumulation` and `data_parallel`."""

    global_batch: int
    micro_batch: int
    accumulation: int
    data_parallel: int


def data_parallel_size(world_size: int, tensor: int, pipeline: int) -> int:
    """Return the number of model copies on the processes. Raises: ConfigError if the sizes do not divide them."""
    size = tensor * pipeline
    if world_size % size:
        raise ConfigError(
            f"{world_size} processes cannot be divided into raptr_ds.parallel.tensor_model_parallel_size={tensor} x "
            f"pipeline_model_parallel_size={pipeline} = {size}. Start a multiple of {size} processes, or lower the "
            "sizes."
        )
    return world_size // size


def solve_batch(
    global_batch: int | None, micro_batch: int | None, accumulation: int | None, data_parallel: int
) -> BatchGeometry:
    """Complete the triangle from what is given.

    One of `global_batch` and `micro_batch` must be given; accumulation defaults to 1 where two are free.
    Raises: ConfigError, with the values and numbers that would fit, if nothing whole solves it.
    Source: DeepSpeed 0.19.8, runtime/config.py, _set_batch_related_parameters, without its silent rounding.
    """
    if global_batch is None:
        if micro_batch is None:
            raise ConfigError(f"{GLOBAL} is missing: set {GLOBAL}, or {MICRO}, to a number of sequences.")
        accumulation = accumulation or 1
        return BatchGeometry(micro_batch * accumulation * data_parallel, micro_batch, accumulation, data_parallel)
    if micro_batch is None:
        accumulation = accumulation or 1
        micro_batch = _quotient(global_batch, data_parallel, ACCUMULATION, accumulation)
    elif accumulation is None:
        accumulation = _quotient(global_batch, data_parallel, MICRO, micro_batch)
    elif global_batch != micro_batch * accumulation * data_parallel:
        product = micro_batch * accumulation * data_parallel
        raise ConfigError(
            f"{GLOBAL}={global_batch} is not {MICRO}={micro_batch} x {ACCUMULATION}={accumulation} x "
            f"{data_parallel} data-parallel ranks = {product}. Remove {ACCUMULATION} (it is derived), "
            f"or set {GLOBAL} to {product}."
        )
    return BatchGeometry(global_batch, micro_batch, accumulation, data_parallel)


def given_sizes(tree: Mapping[str, Any]) -> tuple[int | None, int | None, int | None]:
    """Return the global batch, micro batch and accumulation that a run file gives."""
    total, micro, accumulation = (int(tree[key]) if key in tree else None for key in BATCH_KEYS)
    return total, micro, accumulation


def check_paths_per_step(batch: BatchGeometry, paths_per_step: int) -> None:
    """Raise ConfigError unless each of a step's paths gets the same number of micro batches."""
    if batch.accumulation % paths_per_step:
        micro_batch, rest = divmod(batch.micro_batch * batch.accumulation, paths_per_step)
        fix = f"Enlarge {GLOBAL}" if rest else f"Set {MICRO} to {micro_batch} and remove {ACCUMULATION}"
        raise ConfigError(
            f"raptr_ds.path.paths_per_step={paths_per_step} must divide the micro batches of a step, {ACCUMULATION}="
            f"{batch.accumulation}: each path is taken by an equal share. {fix}, or change paths_per_step."
        )


def check_micro_batches(batch: BatchGeometry, sizes: Sequence[int]) -> None:
    """Raise ConfigError unless micro batches of each of these sizes make up what a rank trains on in a step."""
    per_rank = batch.micro_batch * batch.accumulation
    for wrong in (size for size in sizes if per_rank % size):
        fits = ", ".join(map(str, divisors(per_rank)))
        raise ConfigError(
            f"raptr_ds.parallel.micro_batches={list(sizes)}: {wrong} must divide the sequences of a step on one data-"
            f"parallel rank, {GLOBAL}={batch.global_batch} / {batch.data_parallel} = {per_rank}. Write one of {fits}."
        )


def divisors(number: int) -> list[int]:
    """Return the divisors of a positive number, ascending."""
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def _quotient(global_batch: int, data_parallel: int, given_key: str, given: int) -> int:
    """Divide the global batch by the ranks and one given factor; it must come out whole."""
    unit = given * data_parallel
    if global_batch % unit == 0:
        return global_batch // unit
    below, above = global_batch // unit * unit, (global_batch // unit + 1) * unit
    fits = f"{below} or {above}" if below else f"{above}"
    raise ConfigError(
        f"{GLOBAL}={global_batch} must be a multiple of {given_key}={given} x {data_parallel} data-parallel ranks "
        f"= {unit}. Set {GLOBAL} to {fits}, or change {given_key} or the number of processes."
    )
