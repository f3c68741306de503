"""What is freed stays with the process, unless the user's environment sets something else; what is imported is kept."""

import gc
import os
import subprocess
import sys

import pytest

from raptr_ds.runtime.host_memory import uncollected_imports

PROGRAM = """
import resource, sys
import numpy as np
from raptr_ds.runtime.host_memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
counts = []
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.empty(1 << 26, np.uint8).fill(1)  # more than glibc ever keeps by itself
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*counts)
"""
LEAST = 32  # faults of 64 MiB, if every page is a huge one of 2 MiB

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's own behaviour")


def faults(how: str, **environment: str) -> list[int]:
    """Return the page faults of taking 64 MiB three times."""
    command = [sys.executable, "-c", PROGRAM, how]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment})
    return [int(count) for count in done.stdout.split()]


def test_memory_is_mapped_once() -> None:
    assert max(faults("kept")[1:]) < LEAST / 2
    assert min(faults("plain")) >= LEAST


def test_the_environment_goes_first() -> None:
    assert min(faults("kept", MALLOC_TRIM_THRESHOLD_="131072")) >= LEAST


def test_what_is_imported_is_left_out_of_collections() -> None:
    before = gc.get_freeze_count()
    try:
        with uncollected_imports():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > before
    finally:
        gc.unfreeze()
