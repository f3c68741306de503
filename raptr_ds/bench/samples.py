"""The samples that a benchmark's rows consist of, a step's time and memory, and the ratios of their medians."""

import ctypes
import ctypes.util
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import comb
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.planner.measure import synchronize

Step = Callable[[], tuple[float, float]]
"""Trains once, and returns the seconds that it waited for agreement and loader."""

_CONFIDENCE = 0.95
_CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Measured:
    """One row's samples, one for each timed round, and for memory one for each round that was not timed.

    path_length: in whole layers, also where layers run in parts. seconds: of the slowest rank. agreement_seconds,
    loader_seconds: how long the step waited for them, by the wall clock. memory_bytes: a step's peak above what was
    allocated before it, on the first rank; peak_bytes: the peak itself. loss: of the batch before any step, by the full
    model; None where it was not evaluated. predicted_seconds: by the cost model, with the speeds that devices and links
    reached in the same rounds; None for other stacks. out_of_memory: a message, where there are no samples.
    """

    name: str
    layout: str
    path_length: float
    flops: int
    seconds: list[float] = field(default_factory=list)
    agreement_seconds: list[float] = field(default_factory=list)
    loader_seconds: list[float] = field(default_factory=list)
    memory_bytes: list[int] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)
    loss: float | None = None
    predicted_seconds: float | None = None
    out_of_memory: str | None = None

    def forget(self) -> None:
        """Remove all samples."""
        timed = (self.seconds, self.agreement_seconds, self.loader_seconds)
        for samples in (*timed, self.memory_bytes, self.peak_bytes):
            samples.clear()


Turn = Callable[[], tuple[Measured, Step]]
"""Returns the row that an entrant's next step belongs to, and the step."""


def time_step(measured: Measured, groups: ProcessGroups, counted: bool, clock: str, step: Step) -> None:
    """Run one step and keep its time and its waits for agreement and loader, if it is counted."""
    now, device = _CLOCKS[clock], groups.device
    gc.collect()
    synchronize(device)
    if groups.topology.world_size > 1:
        dist.barrier(group=groups.control)
    start = now()
    agreement, loader = step()
    synchronize(device)
    seconds = torch.tensor(now() - start, dtype=torch.float64)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=groups.control)
    if counted:
        measured.seconds.append(seconds.item())
        measured.agreement_seconds.append(agreement)
        measured.loader_seconds.append(loader)


def measure_memory(measured: Measured, device: torch.device, step: Step) -> None:
    """Run one step and keep its peak memory."""
    gc.collect()
    synchronize(device)
    memory = _StepMemory(device)
    step()
    synchronize(device)
    peak = memory.peak()
    measured.memory_bytes.append(peak - memory.start)
    measured.peak_bytes.append(peak)


class _StepMemory:
    """The peak memory since its creation: the allocator's on a GPU, the resident set's on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.start = torch.cuda.memory_allocated(device)
            return
        library = ctypes.CDLL(ctypes.util.find_library("c"))
        if hasattr(library, "malloc_trim"):
            library.malloc_trim(0)  # or memory that an earlier step freed would hide what this one needs
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from here (proc(5))
        self.start = _status_bytes("VmRSS")

    def peak(self) -> int:
        """Return the peak so far, in bytes."""
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else _status_bytes("VmHWM")


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


@dataclass(frozen=True)
class MedianRatio:
    """A median and its confidence interval of 95% or more, by order statistics: no distribution is assumed.

    Five samples or fewer have no such interval; it is then their whole range.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, numerators: Sequence[float], denominators: Sequence[float], unit: float = 1.0) -> "MedianRatio":
        """Return the median of the ratios within each round, in units of `unit`: a slow round cancels out."""
        ratios = sorted(a / b / unit for a, b in zip(numerators, denominators, strict=True))
        skipped = _left_out(len(ratios))
        return cls(median(ratios), ratios[skipped], ratios[-1 - skipped])

    @classmethod
    def of_separate(
        cls, numerators: Sequence[float], denominators: Sequence[float], unit: float = 1.0
    ) -> "MedianRatio":
        """Return the ratio of medians of samples that share no rounds; its interval is wider."""
        above, below = cls.of(numerators, [unit] * len(numerators)), cls.of(denominators, [1.0] * len(denominators))
        return cls(above.value / below.value, above.low / below.high, above.high / below.low)

    def against(self, aim: float) -> str:
        """Return whether the ratio reaches an aim, and whether the samples are enough to know, in words."""
        verdict = "reached" if self.value >= aim else "missed"
        return f"{verdict}, within the noise" if self.low < aim <= self.high else verdict


def _left_out(count: int) -> int:
    """Return how many of `count` sorted samples lie outside of the interval at each end.

    The median is below the k-th smallest sample with the probability of fewer than k heads in `count` coin tosses.
    """
    skipped, chance = 0, 0.5**count
    while skipped < (count - 1) // 2:
        chance += comb(count, skipped + 1) * 0.5**count
        if 2 * chance > 1 - _CONFIDENCE:
            break
        skipped += 1
    return skipped
