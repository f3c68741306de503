"""Progress for a person: a live line on a terminal, plain lines elsewhere."""

import contextlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

PLAIN_INTERVAL_SECONDS = 10.0


@dataclass(frozen=True)
class ProgressState:
    """What a progress line shows. step counts from 1, phase from 0 as in metrics.jsonl."""

    step: int
    num_steps: int
    loss: float
    phase: int
    path_length: float
    num_layers: int
    tokens_per_second: float | None
    flops_saved: float | None
    """Fraction of the full model's FLOPs so far that were not executed."""
    seconds_left: float | None
    failed_saves: int = 0
    """Checkpoints that could not be written."""
    slow_rank: str = ""
    """The rank that the others wait for, if one is slow."""

    @property
    def fields(self) -> dict[str, str]:
        """The parts of the line after the step, as short text."""
        speed, saved = self.tokens_per_second, self.flops_saved
        return {
            "loss": f"loss {self.loss:.4f}",
            "phase": f"phase {self.phase}",
            "path": f"path {self.path_length:.3g}/{self.num_layers}",
            "speed": "- tok/s" if speed is None else f"{short_number(speed)} tok/s",
            "saved": "" if saved is None else f"saved {saved:.1%}",
            "left": "" if self.seconds_left is None else f"left {short_time(self.seconds_left)}",
            "slow": self.slow_rank,
            "failed": f"{self.failed_saves} checkpoints NOT written" if self.failed_saves else "",
        }


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

    def show(self, state: ProgressState) -> None:
        """Show the state after a step."""

    def say(self, message: str) -> None:
        """Print a line that stays."""

    def close(self) -> None:
        """Restore the terminal."""


class PlainProgress(Progress):
    """Prints a line for the first and last step, at a new phase, and every ten seconds in between."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream: TextIO | None = stream
        self._clock = clock
        self._next_time = 0.0
        self._phase: int | None = None

    def show(self, state: ProgressState) -> None:
        """Print the state's line if it is due."""
        now = self._clock()
        if state.phase == self._phase and state.step != state.num_steps and now < self._next_time:
            return
        self._next_time, self._phase = now + PLAIN_INTERVAL_SECONDS, state.phase
        self.say("  ".join([f"step {state.step}/{state.num_steps}", *filter(None, state.fields.values())]))

    def say(self, message: str) -> None:
        """Print a line."""
        if self._stream is None:
            return
        try:
            print(message, file=self._stream, flush=True)
        except OSError:
            # The reader of our output is gone (a closed pipe or terminal): no reason to end training.
            _discard(self._stream)
            self._stream = None


def _discard(stream: TextIO) -> None:
    """Send what a stream still buffers nowhere: Python would fail to flush it at exit, and end with code 120."""
    with contextlib.suppress(OSError), Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


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
        self._bar = Bar(*columns, console=Console(file=stream), refresh_per_second=4, expand=True)
        self._task = self._bar.add_task("", total=None, line="")
        self._started = False

    def show(self, state: ProgressState) -> None:
        """Update the live line."""
        if not self._started:
            self._bar.start()
            self._started = True
        line = "  ".join(filter(None, state.fields.values()))
        self._bar.update(self._task, total=state.num_steps, completed=state.step, line=line)

    def say(self, message: str) -> None:
        """Print a line above the live one."""
        self._bar.console.print(message, markup=False, highlight=False)

    def close(self) -> None:
        """Stop the live line, leaving its last state."""
        if self._started:
            self._bar.stop()


def build_progress(kind: str, stream: TextIO | None = None) -> Progress:
    """Return the progress that `raptr_ds.log.progress` names; auto is rich on a terminal and plain elsewhere."""
    output: TextIO = sys.stdout if stream is None else stream
    if kind == "none":
        return Progress()
    if kind == "rich" or (kind == "auto" and output.isatty()):
        return RichProgress(output)
    return PlainProgress(output)
