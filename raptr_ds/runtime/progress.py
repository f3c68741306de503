"""Progress for a person: a live line on a terminal, plain lines elsewhere."""

import contextlib
import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

PLAIN_INTERVAL_SECONDS = 10.0
_GONE = {errno.EPIPE, errno.EIO, errno.EBADF}  # a closed pipe or terminal


def short_number(value: float) -> str:
    """Return a count with three digits and a unit: 12345 gives 12.3k."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size * 0.9995:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def short_time(seconds: float) -> str:
    """Return a duration as m:ss, h:mm:ss or d-hh:mm:ss."""
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}-{hours:02d}:{minutes:02d}:{whole % 60:02d}"
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


class Progress:
    """Shows how a run goes; this one shows nothing."""

    def show(self, step: int, num_steps: int, phase: int, words: str) -> None:
        """Show what `words` say after a step; step counts from 1, phase from 0 as in metrics.jsonl."""

    def say(self, message: str) -> None:
        """Print a line that stays."""

    def close(self) -> None:
        """Restore the terminal."""


class _Output:
    """A stream that drops what cannot be written: a missing reader or a full disk is no reason to end training."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._forgiven():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._forgiven():
            self._stream.flush()

    @contextmanager
    def _forgiven(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _GONE:
                # Python would fail to flush what is still buffered at exit, and end with code 120.
                with contextlib.suppress(OSError), Path(os.devnull).open("w") as nowhere:
                    os.dup2(nowhere.fileno(), self._stream.fileno())


class PlainProgress(Progress):
    """Prints a line for the first and last step, at a new phase, and every ten seconds in between."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream: Any = _Output(stream)
        self._clock = clock
        self._next_time = 0.0
        self._phase: int | None = None

    def show(self, step: int, num_steps: int, phase: int, words: str) -> None:
        """Print the step's line if it is due."""
        now = self._clock()
        if phase == self._phase and step != num_steps and now < self._next_time:
            return
        self._next_time, self._phase = now + PLAIN_INTERVAL_SECONDS, phase
        self.say(f"step {step}/{num_steps}  {words}")

    def say(self, message: str) -> None:
        """Print a line."""
        print(message, file=self._stream, flush=True)


class RichProgress(Progress):
    """Keeps one live line at the bottom of a terminal; what `say` prints scrolls above it."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar
        from rich.table import Column

        columns = (
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[line]}", table_column=Column(no_wrap=True), markup=False),
        )
        output: Any = _Output(stream)
        self._bar = Bar(*columns, console=Console(file=output), refresh_per_second=4, expand=True)
        self._task = self._bar.add_task("", total=None, line="")

    def show(self, step: int, num_steps: int, phase: int, words: str) -> None:
        """Update the live line."""
        self._bar.start()
        self._bar.update(self._task, total=num_steps, completed=step, line=words)

    def say(self, message: str) -> None:
        """Print a line above the live one."""
        self._bar.console.print(message, markup=False, highlight=False, emoji=False)

    def close(self) -> None:
        """Stop the live line, leaving its last state."""
        if self._bar.live.is_started:
            self._bar.stop()


def build_progress(kind: str, stream: TextIO | None = None, *, launcher: str = "none") -> Progress:
    """Return the progress that `raptr_ds.log.progress` names; auto is rich on a terminal and plain elsewhere.

    Open MPI's mpirun gives each rank a pseudo-terminal, wherever its own output goes: auto is plain there.
    """
    output: TextIO = sys.stdout if stream is None else stream
    if kind == "none":
        return Progress()
    if kind == "rich" or (kind == "auto" and output.isatty() and launcher != "mpirun"):
        return RichProgress(output)
    return PlainProgress(output)
