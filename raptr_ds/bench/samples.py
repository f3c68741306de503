"""The samples that a benchmark's rows consist of, a step's time and memory, and the ratios of their medians."""

import ctypes
import ctypes.util
import gc
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import comb
from pathlib import Path
from statistics import median

import torch

from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.planner.measure import slowest_seconds, synchronize

Step = Callable[[], tuple[float, float]]
"""Trains once, and returns the seconds that it waited for agreement and loader."""

SAMPLES = ("seconds", "agreement_seconds", "loader_seconds", "memory_bytes", "peak_bytes")
"""The fields of a row that hold samples."""
_CONFIDENCE = 0.95
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


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
        for samples in (getattr(self, name) for name in SAMPLES):
            samples.clear()


class Entrant(ABC):
    """A participant in the benchmark, with the rows that its steps fill; all ranks call its methods together."""

    name: str
    rows: list[Measured]

    @abstractmethod
    def build(self) -> None:
        """Allocate memory and evaluate the batch. Raises: ConfigError for what the entrant does not support."""

    def begin_round(self, is_first_to_count: bool) -> None:  # noqa: B027 - not everyone has such work
        """Do what belongs to a round but not to a step."""

    @abstractmethod
    def next_step(self) -> tuple[Measured, Step]:
        """Return the next step and its row; a round has as many as there are rows."""

    def end_of_timing(self) -> None:  # noqa: B027
        """Do what follows the last timed step."""

    @abstractmethod
    def close(self) -> None:
        """Free all memory; repeated calls do nothing."""


def time_step(measured: Measured, groups: ProcessGroups, counted: bool, clock: str, step: Step) -> None:
    """Run one step and keep its time and its waits for agreement and loader, if it is counted."""
    waits: list[float] = []
    gc.collect()
    seconds = slowest_seconds(groups, lambda: waits.extend(step()), CLOCKS[clock])
    if counted:
        measured.seconds.append(seconds)
        measured.agreement_seconds.append(waits[0])
        measured.loader_seconds.append(waits[1])


def measure_memory(measured: Measured, device: torch.device, step: Step) -> None:
    """Run one step and keep its peak memory: the allocator's on a GPU, the resident set's on a CPU."""
    gc.collect()
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
    else:
        library = ctypes.CDLL(ctypes.util.find_library("c"))
        if hasattr(library, "malloc_trim"):
            library.malloc_trim(0)  # or memory that an earlier step freed would hide what this one needs
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from here (proc(5))
        start = _status_bytes("VmRSS")
    step()
    synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status_bytes("VmHWM")
    measured.memory_bytes.append(peak - start)
    measured.peak_bytes.append(peak)


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
