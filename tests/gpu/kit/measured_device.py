"""The device that is measured: a GPU, or a CPU in a dry run, where everything is tiny; and how its work is timed."""

import os
import time
from collections.abc import Callable
from statistics import median

import torch

from raptr_ds.runtime.utilization import peak_flops

DEVICE = torch.device(os.environ.get("KIT_DEVICE", "cuda"))
IS_DRY_RUN = DEVICE.type == "cpu"


def peak() -> float | None:
    """Return the device's peak of dense bf16 products in FLOP/s; None where it is not known."""
    return None if IS_DRY_RUN else peak_flops(torch.cuda.get_device_name(DEVICE), "bf16")


def rate_text(flops_per_second: float) -> str:
    """Return a rate in TFLOP/s, and its share of the peak where that is known."""
    highest = peak()
    share = "" if highest is None else f" ({flops_per_second / highest:.0%} of the peak)"
    return f"{flops_per_second / 1e12:.3g} TFLOP/s{share}"


def median_seconds(work: Callable[[], object], repetitions: int = 20, warmup: int = 3) -> float:
    """Return the median seconds that the device takes for some work; in a dry run, of few repetitions.

    On a GPU between events around each repetition, so that the host's launches are hidden where they are faster.
    """
    if IS_DRY_RUN:
        repetitions, warmup = 2, 1
    for _ in range(warmup):
        work()
    if IS_DRY_RUN:
        return median(_seconds_on_host(work) for _ in range(repetitions))
    pairs = [(_event(), _event()) for _ in range(repetitions)]
    torch.cuda.synchronize()
    for begin, end in pairs:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return median(begin.elapsed_time(end) for begin, end in pairs) / 1e3  # from milliseconds


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def _seconds_on_host(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
