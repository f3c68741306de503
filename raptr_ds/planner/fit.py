"""A run on fewer GPUs than before: the ZeRO stage and the micro batch with which it fits into their memory.

python -m raptr_ds.planner.fit --processes N --memory BYTES < resolved run file

prints them as JSON (raptr_ds/runtime/elastic_memory.py starts it where a run was started again on other processes).
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass

from raptr_ds.config.elastic import largest_fitting
from raptr_ds.config.rules import check_rules
from raptr_ds.config.run import RunConfig
from raptr_ds.planner.shortage import MemoryNeed, run_on_standard_input


@dataclass(frozen=True)
class Fit:
    """Sizes for a device's memory. needed: the plan's bytes of the fullest rank. is_enough: whether they fit."""

    zero_stage: int
    micro_batch: int
    needed: float
    is_enough: bool


def fit(config: RunConfig, memory: int) -> Fit:
    """Return the run's own sizes if they fit into `memory` bytes of a GPU, else the first that do.

    Tried in the order of what they cost: smaller micro batches, each with ZeRO up to stage 2, and then the same with
    stage 3, which gathers weights. If nothing fits, what needs least. Stages need several data-parallel ranks.
    """
    tried = []
    for candidate in _candidates(config):
        need = MemoryNeed.fullest(candidate).memory.total
        tried.append(Fit(candidate.zero_stage, candidate.batch.micro_batch, need, need <= memory))
        if tried[-1].is_enough:
            return tried[-1]
    return min(tried, key=lambda fit: fit.needed)


def _candidates(config: RunConfig) -> Iterator[RunConfig]:
    own = config.zero_stage
    highest = 1 if config.parallel.pipeline_model_parallel_size > 1 else 3
    if config.batch.data_parallel == 1:
        highest = own
    cheap, dear = range(own, max(min(2, highest), own) + 1), range(max(3, own + 1), highest + 1)
    for stages in (cheap, dear):
        for micro_batch in _micro_batches(config):
            for stage in stages:
                candidate = config.with_memory_sizes(stage, micro_batch)
                if not check_rules(candidate):
                    yield candidate


def _micro_batches(config: RunConfig) -> list[int]:
    """Return the run's micro batch and its halves that cut a rank's sequences equally, the largest first."""
    if config.parallel.micro_batches:  # each phase has a size of its own
        return [config.batch.micro_batch]
    per_rank, sizes = config.batch.micro_batch * config.batch.accumulation, [config.batch.micro_batch]
    while sizes[-1] > 1:
        sizes.append(largest_fitting(sizes[-1] // 2, per_rank, config.path.paths_per_step))
    return sizes


def main() -> None:
    """Print the fit of the run file on standard input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, required=True, help="processes of the run")
    parser.add_argument("--memory", type=int, required=True, help="bytes of a GPU's memory")
    arguments = parser.parse_args()
    print(json.dumps(dataclasses.asdict(fit(run_on_standard_input(arguments.processes), arguments.memory))))


if __name__ == "__main__":
    main()
