"""The host's memory, of a run that computes on CPUs: what a step frees stays with the process for the next one."""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h
_LARGEST = 2**31 - 1
_USERS_OWN = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_")


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, where the user's environment does not tell it what to do.

    Each step frees its activations and gradients and takes as much again. glibc gives large pieces back to the system,
    which then clears and maps every page anew: up to a tenth of a step (docs/performance.md). The peak stays the same.
    Other C libraries are left alone.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _USERS_OWN):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _LARGEST)
