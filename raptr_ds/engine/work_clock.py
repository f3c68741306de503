"""How long a rank works by itself in a step: what shows that it is slow, while all others wait for it."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch


class WorkClock:
    """Adds up the time of a step in which this rank does not wait for others.

    On a GPU it is the device's time between events, which are read when the host has waited for the step's result
    anyway; elsewhere it is the host's. is_on: False for a rank without others, which then costs nothing.
    """

    def __init__(self, device: torch.device, is_on: bool) -> None:
        self._device, self._is_on = device, is_on
        self._is_in_step = self._is_running = False
        self._marks: list[Any] = []  # a start and an end in turn: events on a GPU, else seconds
        self._spare: list[torch.cuda.Event] = []

    @property
    def is_on_device(self) -> bool:
        """Whether events are read: each costs microseconds, where the host's clock costs next to nothing."""
        return self._device.type == "cuda"

    def begin_step(self) -> None:
        """Forget the last step; the clock stands still until `start` or `working`."""
        self._spare += self._marks if self.is_on_device else []
        self._marks.clear()
        self._is_in_step, self._is_running = self._is_on, False

    def start(self) -> None:
        """Count from here, if a step has begun."""
        self._switch(True)

    def stop(self) -> None:
        """Count up to here."""
        self._switch(False)

    def waiting(self) -> AbstractContextManager[None]:
        """Do not count the block: other ranks may be waited for there."""
        return self._switched(False)

    def working(self) -> AbstractContextManager[None]:
        """Count the block, whether or not the clock ran before."""
        return self._switched(True)

    @contextmanager
    def _switched(self, runs: bool) -> Iterator[None]:
        before = self._is_running
        self._switch(runs)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, runs: bool) -> None:
        if runs == self._is_running or not self._is_in_step:
            return
        self._is_running = runs
        if not self.is_on_device:
            self._marks.append(time.perf_counter())
            return
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._marks.append(event)

    def end_step(self) -> float:
        """Return the seconds that were counted, 0 if none, once the device has passed the last mark.

        Until the next step nothing is counted: evaluations make the same calls.
        """
        assert not self._is_running, "no stop"
        self._is_in_step = False
        pairs = zip(self._marks[::2], self._marks[1::2], strict=True)
        if self.is_on_device:
            return sum(start.elapsed_time(end) for start, end in pairs) / 1e3
        return sum(end - start for start, end in pairs)
