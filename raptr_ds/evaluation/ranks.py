"""The processes that share an evaluation: each computes a part of the requests, and all have all results."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed

from raptr_ds.parallel.launch import detect_launch
from raptr_ds.runtime.lost_ranks import disconnect, ending_alone, lost_ranks_explained

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Ranks:
    """This process among those of its launch (torchrun, deepspeed, srun, mpirun)."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    def share(self, items: Sequence[_Item]) -> Sequence[_Item]:
        """Return this rank's part of items that are sorted by their cost: parts of about the same cost."""
        return items[self.rank :: self.world_size]

    def merge(self, part: dict[int, _Item]) -> dict[int, _Item]:
        """Return what all ranks found. Every rank calls it at the same point."""
        if self.world_size == 1:
            return part
        parts: list[dict[int, _Item]] = [{} for _ in range(self.world_size)]
        torch.distributed.all_gather_object(parts, part)
        return {number: value for found in parts for number, value in found.items()}

    @property
    def device(self) -> str:
        """This rank's GPU, else the CPU."""
        return f"cuda:{self.local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """Yield this process's place among those that were launched together, connected to them.

    Results are gathered by gloo, whatever computes them. An error in the block is printed by the first rank that meets
    it, which may be the only one. Raises: ConfigError for a launch that lacks something; LostRankError.
    """
    launch = detect_launch()
    ranks = Ranks(launch.rank, launch.world_size, launch.local_rank)
    if ranks.world_size == 1:
        yield ranks
        return
    torch.distributed.init_process_group("gloo", timeout=timedelta(days=1))
    try:
        with lost_ranks_explained(), ending_alone():
            torch.distributed.barrier()  # nobody leaves while another still connects
            yield ranks
    finally:
        disconnect()
