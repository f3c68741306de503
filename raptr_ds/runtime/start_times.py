"""Where the seconds of a start went."""

import os
import time
from pathlib import Path


class StartTimes:
    """Seconds by part, in order; the first one, `imports`, began with the process."""

    def __init__(self) -> None:
        self.seconds = {"imports": round(_seconds_since_the_process_began(), 2)}
        self._last = time.monotonic()

    def done(self, part: str) -> None:
        """What has happened since the part before was `part`."""
        now = time.monotonic()
        self.seconds[part] = round(now - self._last, 2)
        self._last = now


def _seconds_since_the_process_began() -> float:
    """Return the age of this process: proc(5), field 22 of stat, in ticks since the machine's start."""
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    began = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began
