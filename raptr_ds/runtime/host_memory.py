"""The host's memory, of a run that computes on CPUs: what a step frees stays with the process for the next one."""

import ctypes
import sys

from raptr_ds.parallel.launch import has_own_malloc_settings

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h
_LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, where the user's environment does not tell it what to do.

    Each step frees its activations and gradients and takes as much again. glibc gives large pieces back to the system,
    which then clears and maps every page anew: up to a tenth of a step (docs/performance.md). The peak stays the same.
    Other C libraries are left alone.
    """
    if sys.platform != "linux" or has_own_malloc_settings():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _LARGEST)
