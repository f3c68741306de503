"""What ranks measure of themselves and pass on to rank 0: how long they work by themselves in a step, and their memory.

The numbers of a step travel with the agreement on a later path (parallel/agreement.py), so that no step waits for them:
the line of step n has those of step n - 2. A rank is compared with those that do the same work on other data; where no
rank does, with all ranks, whose work may differ (docs/performance.md lists what each layout shows).
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from raptr_ds.parallel.topology import Topology
from raptr_ds.runtime.host_memory import resident_bytes

NUM_REPORTED = 4
"""Numbers that a rank reports: own seconds, resident bytes of the host now and at most, bytes of the device at most."""
LAG_STEPS = 2
_WINDOW = 20  # steps over which a rank must be slow
_SLOW = 1.5  # times the median
_QUIET_STEPS = 100  # between two events


@dataclass(frozen=True)
class SlowRank:
    """The rank that others wait for. seconds, median: its own time of a step and that of the ranks it is like."""

    rank: int
    host: str
    seconds: float
    median: float

    @property
    def ratio(self) -> float:
        """How many times as long the rank takes."""
        return self.seconds / self.median


class Ranks:
    """The numbers of this rank, and on rank 0 those of all.

    report: what this rank passes on to all. slow: the slowest rank, if it took over 1.5 times the median over the last
    20 steps. hosts: of the ranks, in their order. interval: steps between lines of metrics.jsonl; memory is read for
    these.
    """

    def __init__(self, topology: Topology, hosts: Sequence[str], device: torch.device, interval: int) -> None:
        self._topology, self._hosts, self._device, self._interval = topology, hosts, device, interval
        self._loading = 0.0
        self._num_steps = 0
        self.report: tuple[float, ...] = (0.0,) * NUM_REPORTED
        self._seconds: deque[np.ndarray] = deque(maxlen=_WINDOW)
        self._memory: np.ndarray = np.zeros(NUM_REPORTED - 1)
        self._next_event = 0
        self.slow: SlowRank | None = None

    def loaded(self, seconds: float) -> None:
        """Report how long this rank took for its part of the next step's batch."""
        self._loading = seconds

    def step_done(self, step: int, own_seconds: float) -> None:
        """Report how long this rank has worked by itself in a 1-based step; the first, which compiles, is left out."""
        self._num_steps += 1
        memory = self.report[1:]
        if self._num_steps == 1 or (step + LAG_STEPS) % self._interval == 0:
            memory = (*resident_bytes(), self._device_bytes())
        measured = self._num_steps > 1 and own_seconds > 0
        self.report = (self._loading + own_seconds if measured else 0.0, *memory)

    def receive(self, reports: np.ndarray) -> None:
        """Take the reports of all ranks, (world size, NUM_REPORTED)."""
        if reports[:, 0].min() > 0:
            self._seconds.append(reports[:, 0])
            if len(self._seconds) == _WINDOW and self._topology.world_size > 1:
                slowest = self._slowest(_WINDOW)
                self.slow = slowest if slowest.ratio > _SLOW else None
        self._memory = reports[:, 1:].max(axis=0)

    def line(self) -> dict[str, float | int]:
        """Return the keys of a training line: of the ranks' times the means since the last line, at most 20 steps."""
        keys: dict[str, float | int] = {}
        if self._topology.world_size > 1 and self._seconds:
            slowest = self._slowest(min(self._interval, _WINDOW))
            keys["slowest_rank"] = slowest.rank
            keys["slowest_rank_seconds"], keys["median_rank_seconds"] = slowest.seconds, slowest.median
        names = ("host_memory_bytes", "host_memory_peak_bytes", "device_memory_peak_bytes")
        return keys | {name: int(value) for name, value in zip(names, self._memory, strict=True) if value}

    def slow_event(self, step: int) -> SlowRank | None:
        """Return the rank that is slow, if that is to be recorded at this step: not more than once in 100 steps."""
        if self.slow is None or step < self._next_event:
            return None
        self._next_event = step + _QUIET_STEPS
        return self.slow

    def _slowest(self, num_steps: int) -> SlowRank:
        seconds = np.mean([*self._seconds][-num_steps:], axis=0)
        median = medians(seconds, self._topology)
        rank = int(np.argmax(seconds / median))
        return SlowRank(rank, self._hosts[rank], float(seconds[rank]), float(median[rank]))

    def _device_bytes(self) -> float:
        return float(torch.cuda.max_memory_allocated(self._device)) if self._device.type == "cuda" else 0.0


def medians(seconds: np.ndarray, topology: Topology) -> np.ndarray:
    """Return for each rank the lower median over the ranks that it is compared with, itself included.

    These have its place in pipeline and tensor groups, or are all ranks if there is one data-parallel rank. The lower
    median, so that of two ranks the slower one is compared with the other.
    """
    shape = (topology.pipeline, topology.data, topology.tensor) if topology.data > 1 else (1, -1, 1)
    by_place = seconds.reshape(shape)
    size = by_place.shape[1]
    middle = np.sort(by_place, axis=1)[:, [(size - 1) // 2]]
    return np.broadcast_to(middle, by_place.shape).reshape(-1)
