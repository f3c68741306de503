"""A step's time and memory, once: the samples that a benchmark's rows consist of."""

import ctypes
import ctypes.util
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.planner.measure import synchronize

Step = Callable[[], tuple[float, float]]
"""Trains once, and returns the seconds that agreement and loader kept it waiting."""

_CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Measured:
    """One contestant's samples, one for each round; of memory, one for each round that was not timed.

    seconds: of the slowest rank. agreement_seconds, loader_seconds: what the step waited, on the wall's clock.
    memory_bytes: a step's peak above what was held before it, on the first rank; peak_bytes: with what was held. loss:
    of the batch before any step, through the full model; None where it was not evaluated. path_length: in whole layers,
    where these run in parts. predicted_seconds: the cost model's, with what devices and links reach in the same rounds;
    None for other stacks. out_of_memory: in words, where the device had too little, and there are no samples.
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
        """Begin anew."""
        for samples in (
            self.seconds,
            self.agreement_seconds,
            self.loader_seconds,
            self.memory_bytes,
            self.peak_bytes,
        ):
            samples.clear()


def time_step(measured: Measured, groups: ProcessGroups, counted: bool, clock: str, step: Step) -> None:
    """Run one step and keep its time and its waits for agreement and loader, if it counts."""
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
    """Run one step and keep its peak of memory."""
    gc.collect()
    synchronize(device)
    memory = _StepMemory(device)
    step()
    synchronize(device)
    peak = memory.peak()
    measured.memory_bytes.append(peak - memory.start)
    measured.peak_bytes.append(peak)


class _StepMemory:
    """The peak of memory from a start on: the allocator's on a GPU, the resident set's on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.start = torch.cuda.memory_allocated(device)
            return
        library = ctypes.CDLL(ctypes.util.find_library("c"))
        if hasattr(library, "malloc_trim"):
            library.malloc_trim(0)  # or what an earlier step freed would hide what this one takes
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from here (proc(5))
        self.start = _status_bytes("VmRSS")

    def peak(self) -> int:
        """Return the peak so far, in bytes."""
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else _status_bytes("VmHWM")


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))
