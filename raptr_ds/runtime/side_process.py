"""A program that runs beside the training: at low priority, never longer than the run, and without its GPUs."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from raptr_ds.errors import Exit
from raptr_ds.parallel.launch import environment_of_child

TOOLS = Path(__file__).resolve().parents[2] / "tools"
_TIED = Path(__file__).with_name("tied_process.py")
_LAST_BYTES = 4000
_LOOK_SECONDS = 0.1
_ERROR = "error: "  # how the tools begin the message of a user's mistake


@dataclass(frozen=True)
class Ended:
    """How a program ended. failure: in its own words, None if it succeeded. is_mistake: the user can correct it."""

    seconds: float
    failure: str | None
    is_mistake: bool = False


class SideProcess:
    """A tool of this repository in a process of its own, which dies with this one.

    words: the tool's file name and its arguments. log: its output is appended there. limit_seconds: after that time it
    is ended. text: its standard input.
    To be started by the main thread: the kernel ties a child to the thread that made it.
    Raises: OSError if the log cannot be written or the process not be started.
    """

    def __init__(
        self, words: Sequence[str], log: Path, limit_seconds: float, *, sees_gpus: bool = False, text: str = ""
    ) -> None:
        self._log, self._limit_seconds, self._started = log, limit_seconds, time.monotonic()
        tied = [sys.executable, "-I", "-S", str(_TIED), str(os.getpid())]
        with log.open("ab") as output, tempfile.TemporaryFile() as standard_input:
            self._log_begin = output.tell()
            standard_input.write(text.encode())
            standard_input.seek(0)
            self._process = subprocess.Popen(
                [*tied, sys.executable, str(TOOLS / words[0]), *words[1:]],
                stdin=standard_input,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment_of_child(sees_gpus),
                start_new_session=True,  # a signal to stop is for the run, which decides what becomes of this process
            )

    def poll(self) -> Ended | None:
        """Return how it ended, None while it runs."""
        seconds = time.monotonic() - self._started
        code = self._process.poll()
        if code is None and seconds > self._limit_seconds:
            self.stop()
            return Ended(seconds, f"not done within {self._limit_seconds:g} s")
        if not code:
            return None if code is None else Ended(seconds, None)
        return Ended(seconds, self._last_words() or f"exit code {code}", is_mistake=code == Exit.USER_ERROR)

    def wait(self) -> Ended:
        """Wait until it has ended, and return how."""
        while (ended := self.poll()) is None:
            time.sleep(_LOOK_SECONDS)
        return ended

    def stop(self) -> None:
        """End it, with what it has started."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _last_words(self) -> str:
        """Return the message of its error, or the last line of its output."""
        try:
            with self._log.open("rb") as log:
                log.seek(max(self._log_begin, log.seek(0, os.SEEK_END) - _LAST_BYTES))
                text = log.read().decode(errors="replace").strip()
        except OSError:
            return ""
        _, found, message = f"\n{text}".rpartition(f"\n{_ERROR}")
        return message if found else text.rpartition("\n")[2]
