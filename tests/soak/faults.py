"""What a fault is, and those that need no launcher."""

import contextlib
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

Fault = Callable[[random.Random], bool]
"""Strikes, and returns whether there was anything to strike."""


class Disturbed(Protocol):
    """A run that faults strike, and whatever starts it again."""

    longest_pause: float
    """Seconds between two faults, at most: with less the run would never train."""

    def is_done(self) -> bool:
        """Return whether the run is trained. Raises: RuntimeError if it is not, and nobody starts it again."""
        ...

    def faults(self, has_disk: bool) -> dict[str, Fault]:
        """Return what may strike, by name. has_disk: the run has a file system of its own, that may be filled."""
        ...

    def close(self) -> None:
        """End all processes."""
        ...


def fill_disk(folder: Path, draw: random.Random) -> bool:
    """Leave no room in the file system of a folder for some seconds."""
    ballast = folder / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(1 << 16))
    time.sleep(draw.uniform(1, 8))
    with contextlib.suppress(OSError):
        ballast.unlink()
    return True
