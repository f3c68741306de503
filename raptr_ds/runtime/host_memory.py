"""The host's memory: how much a process has; freed memory stays with it; garbage collection leaves modules out."""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raptr_ds.parallel.launch import has_own_malloc_settings

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h
_LARGEST = 2**31 - 1
_STATUS = Path("/proc/self/status")


def resident_bytes() -> tuple[int, int]:
    """Return the memory that this process has now and had at most, in bytes; zeros where the system does not say.

    getrusage would count what the process had before it was replaced by this program.
    """
    try:
        status = _STATUS.read_bytes()
    except OSError:
        return 0, 0
    now, most = _kilobytes(status, b"VmRSS:") * 1024, _kilobytes(status, b"VmHWM:") * 1024
    return now, max(now, most)  # Linux updates the latter now and then


def _kilobytes(status: bytes, key: bytes) -> int:
    _, found, rest = status.partition(key)
    return int(rest.split(maxsplit=1)[0]) if found else 0


def keep_freed_memory() -> None:
    """Let glibc keep freed memory, unless the user's environment has settings of its own.

    Each step frees its activations and gradients and allocates as much again. glibc returns large pieces to the system,
    which then clears and maps every page anew: a tenth of a step and more. docs/performance.md has what long runs then
    hold. Other C libraries stay as they are.
    """
    if sys.platform != "linux" or has_own_malloc_settings():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _LARGEST)


@contextmanager
def uncollected_imports() -> Iterator[None]:
    """Import without garbage collection in this block, and exclude what was imported from all later collections.

    torch, DeepSpeed and megatron-core are a third of a million objects that stay. Looking through them again and again
    is a quarter of the time that importing them takes, and a tenth of a second in a collection during training.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
