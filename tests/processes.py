"""Processes of this machine, found by what they run and where, and what a fault does to one of them."""

import contextlib
import os
import random
import signal
from collections.abc import Iterable
from pathlib import Path


def all_processes() -> list[int]:
    """Return the number of every process, those in namespaces below this one too."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def words_of(process: int) -> list[str]:
    """Return a process's command, empty if it is gone."""
    return _entries(process, "cmdline")


def variables_of(process: int) -> set[str]:
    """Return the NAME=VALUE of a process's environment, empty if it is gone."""
    return set(_entries(process, "environ"))


def is_rank(process: int) -> bool:
    """Whether a process trains: an interpreter's, not that of a launcher which has the same words in its command."""
    words = words_of(process)
    return "--deepspeed_config" in words[2:5] and "python" in words[0]


def send(processes: Iterable[int], number: signal.Signals, draw: random.Random) -> bool:
    """Send a signal to one of some processes; return whether there was one."""
    found = sorted(processes)
    if not found:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(draw.choice(found), number)
        return True
    return False


def resident_megabytes(process: int) -> float:
    """Return the memory that a process holds, 0 if it is gone."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1000 for line in status.splitlines() if line.startswith("VmRSS")), 0.0)


def _entries(process: int, name: str) -> list[str]:
    try:
        return Path(f"/proc/{process}/{name}").read_text(errors="replace").split("\0")
    except OSError:
        return []
