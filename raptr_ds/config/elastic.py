"""A run that is started again on another number of processes: its global batch stays, and what divides it follows."""

from pathlib import Path
from typing import Any

from raptr_ds.config.batch import ACCUMULATION, GLOBAL, MICRO, BatchGeometry, divisors, given_sizes, solve_batch
from raptr_ds.config.sections import ParallelSection
from raptr_ds.errors import ConfigError
from raptr_ds.json_text import parse_json


def keep_global_batch(
    tree: dict[str, Any], folder: Path, parallel: ParallelSection, paths_per_step: int, world_size: int
) -> tuple[dict[str, Any], ParallelSection, list[str]]:
    """Return the run file's tree and its layout fitted to `world_size` processes, and a line for each changed key.

    The run's own config.json, in `folder`, holds the batch of its last start; train_batch_size in the run file goes
    before it. Nothing changes without a record, nor on as many ranks as in that start if the run file gives this batch
    on them. Micro batches become no larger than the run file's, or than they were where it leaves them out, as memory
    was planned for them.
    Raises: ConfigError, with the numbers of processes that fit, if the global batch cannot be divided among the ranks.
    """
    copy = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    began = _batch_in(folder / "config.json")
    if began is None or world_size % copy:  # the latter is refused where the batch is solved
        return tree, parallel, []
    recorded, micro, accumulation = began
    total, most, ranks = int(tree.get(GLOBAL, recorded)), int(tree.get(MICRO, micro)), world_size // copy
    given = _batch_of(tree, ranks) if ranks * micro * accumulation == recorded else None
    if given is not None and given.global_batch == total and given.micro_batch <= most:
        return tree, parallel, []
    if total % ranks:
        fits = ", ".join(str(size * copy) for size in divisors(total) if size <= 2 * ranks)
        raise ConfigError(
            f"this run was started again on {world_size} processes, {ranks} data-parallel ranks, which cannot share "
            f"its global batch of {total} sequences equally. Start it on one of these numbers of processes: {fits}."
        )
    per_rank = total // ranks
    why = f"started again on {ranks} data-parallel ranks; the global batch stays {total}"
    fitted = largest_fitting(most, per_rank, paths_per_step)
    notes = [f"{MICRO}={fitted} ({why})"]
    tree = {**tree, GLOBAL: total, MICRO: fitted}
    tree.pop(ACCUMULATION, None)
    if parallel.micro_batches:
        sizes = [largest_fitting(size, per_rank, paths_per_step) for size in parallel.micro_batches]
        parallel = parallel.model_copy(update={"micro_batches": tuple(sizes)})
        notes.append(f"raptr_ds.parallel.micro_batches={sizes} ({why})")
    return tree, parallel, notes


def largest_fitting(size: int, per_rank: int, paths_per_step: int) -> int:
    """Return the largest micro batch up to `size` that cuts a rank's sequences into equal parts for every path."""
    fits = [one for one in divisors(per_rank) if one <= size and per_rank // one % paths_per_step == 0]
    return fits[-1] if fits else 1


def _batch_of(tree: dict[str, Any], ranks: int) -> BatchGeometry | None:
    """Return the batch that a run file gives on a number of ranks, None if it gives none that is whole."""
    try:
        return solve_batch(*given_sizes(tree), ranks)
    except ConfigError:
        return None


def _batch_in(config: Path) -> tuple[int, int, int] | None:
    """Return the batch of a run's config.json, (global, micro, accumulation), None where it cannot be read."""
    try:
        tree = parse_json(config.read_text(encoding="utf-8"))
        return int(tree[GLOBAL]), int(tree[MICRO]), int(tree[ACCUMULATION])
    except (OSError, ValueError, LookupError, TypeError):
        return None
