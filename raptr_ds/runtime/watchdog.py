"""The watchdog: a run in which nothing moves any more is found, described and ended, on all ranks.

The main thread reports each step and each piece of longer work. A thread of every rank looks whether its own rank still
moves. The first that does not raises an alarm in the launch's store; all ranks answer it with the place at which they
stand, write the stacks of their threads into the run's folder, and leave with Exit.HUNG. The rank that others wait for
is the one that stands elsewhere, or does not answer. Time in which the thread itself did not run does not count: a job
that was suspended as a whole (by Slurm's gang scheduling, or with its machine) goes on.
"""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]

from raptr_ds.errors import Exit, RaptrError
from raptr_ds.parallel.roll_call import listed
from raptr_ds.runtime.events import EventLog

T = TypeVar("T")

START_SECONDS = 1800.0
"""What building a run may take: gigabytes of a checkpoint from a slow disk, compiling."""
SAVE_SECONDS = 1800.0
_POLL_SECONDS = 5.0
_ANSWER_SECONDS = 30.0  # for all ranks to answer an alarm
_STORE_SECONDS = 10.0  # for the store to answer
_SLOW_STEPS = 10  # times the median step that a step may take
_PACKAGE = f"{Path(__file__).parents[1]}{os.sep}"
_ALARM, _ANSWER, _LEAVING = "alarm", "answer/{}", "leaving/{}"


class Watchdog:
    """Watches one rank, from its making to `close`.

    store: the launch's, of which the thread uses a copy. seconds: how long a rank may stand still, at least; ten times
    the median step if that is longer; 0: any time. folder: the run's.
    """

    def __init__(self, store: Store, rank: int, world_size: int, folder: Path, seconds: float) -> None:
        self._rank, self._world_size, self._folder, self._seconds = rank, world_size, folder, seconds
        self._main = threading.get_ident()
        self._place, self._moved, self._allowed = "starting", time.monotonic(), max(seconds, START_SECONDS)
        self._steps: deque[float] = deque(maxlen=101)
        self._closed = threading.Event()
        self._store = PrefixStore("raptr_ds/watchdog", store.clone())  # pyright: ignore[reportAttributeAccessIssue]
        self._caller = ThreadPoolExecutor(1, "watchdog-store")  # a call of a store whose process is stopped hangs
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if seconds:
            self._thread.start()

    def step_done(self, step: int, seconds: float) -> None:
        """Report that a 1-based step is done, and how long it took."""
        self._steps.append(seconds)
        self.moved(f"after step {step}")

    def moved(self, place: str, allow_seconds: float = 0.0) -> None:
        """Report where this rank is. allow_seconds: what it may take from there to the next report, if that is long."""
        self._place, self._moved, self._allowed = place, time.monotonic(), max(self._seconds, allow_seconds)

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        if self._seconds:
            self._thread.join()
        self._caller.shutdown(wait=False)

    def _watch(self) -> None:
        poll, looked = min(_POLL_SECONDS, self._seconds / 4), time.monotonic()
        while not self._closed.wait(poll):
            now = time.monotonic()
            if (late := now - looked - poll) > poll:  # this process was suspended, with its job or its machine
                self._moved = min(now, self._moved + late)
            stands = now - self._moved
            is_stuck = stands > max(self._allowed, _SLOW_STEPS * median(self._steps or [0.0]))
            try:
                if is_stuck:
                    self._ask(lambda: self._store.compare_set(_ALARM, "", time.strftime("%Y%m%d-%H%M%S")))
                if alarm := self._get(_ALARM):
                    self._answer(alarm, stands)
            except (dist.DistError, TimeoutError) as error:
                if is_stuck:
                    self._write_stacks(time.strftime("%Y%m%d-%H%M%S"))
                    _print(
                        f"rank {self._rank} has stood still for {stands:.0f} s ({self._place}: {self._where()}), and "
                        f"the store by which ranks meet does not answer: its process, rank 0's or torchrun's, is "
                        f"stopped, or its machine is gone ({type(error).__name__})"
                    )
                    os._exit(Exit.HUNG)
            looked = time.monotonic()

    def _answer(self, alarm: str, stands: float) -> None:
        """Answer an alarm, wait for the other answers, and leave; the first rank that answers prints them."""
        own = {"host": socket.gethostname(), "place": self._place, "seconds": stands, "where": self._where()}
        self._set(_ANSWER.format(self._rank), json.dumps(own))
        stacks = self._write_stacks(alarm)
        deadline = time.monotonic() + min(_ANSWER_SECONDS, max(2.0, self._seconds))
        while len(answers := self._answers()) < self._world_size and time.monotonic() < deadline:
            time.sleep(0.2)
        if min(answers) == self._rank:
            with contextlib.suppress(RaptrError):  # a disk that does not answer may be what the run waits for
                EventLog(self._folder).record("hang", ranks=answers, missing=_missing(answers, self._world_size))
            longest = max(answer["seconds"] for answer in answers.values())
            lines = [
                f"nothing has moved for {longest:.0f} s (raptr_ds.train.watchdog_seconds={self._seconds:g}):",
                *describe(answers, self._world_size),
                f"stacks of all threads: {stacks.parent if stacks else 'could not be written'}",
            ]
            _print("\n  ".join(lines))
        self._set(_LEAVING.format(self._rank), "yes")
        others = [rank for rank in answers if self._rank == 0 and rank != 0]  # rank 0 may keep the store: it goes last
        while others and time.monotonic() < deadline + 5:
            time.sleep(0.2)
            others = [rank for rank in others if not self._get(_LEAVING.format(rank))]
        os._exit(Exit.HUNG)

    def _answers(self) -> dict[int, dict[str, Any]]:
        found = {rank: self._get(_ANSWER.format(rank)) for rank in range(self._world_size)}
        return {rank: json.loads(answer) for rank, answer in found.items() if answer}

    def _get(self, key: str) -> str | None:
        """Return a value, None where there is none. Raises: DistError or TimeoutError, as do the next two."""
        return self._ask(lambda: self._store.get(key).decode() if self._store.check([key]) else None)

    def _set(self, key: str, value: str) -> None:
        self._ask(lambda: self._store.set(key, value))

    def _ask(self, action: Callable[[], T]) -> T:
        return self._caller.submit(action).result(_STORE_SECONDS)

    def _write_stacks(self, alarm: str) -> Path | None:
        """Write the stacks of all threads, and what NCCL recorded of its collectives, for the run's folder."""
        folder = self._folder / f"hang-{alarm}"
        path = folder / f"rank-{self._rank:05d}.txt"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with path.open("w") as stream:
                faulthandler.dump_traceback(stream, all_threads=True)
            if torch.cuda.is_available():
                recorded = torch._C._distributed_c10d._dump_nccl_trace()  # type: ignore[attr-defined]
                path.with_suffix(".nccl").write_bytes(recorded)
        except (OSError, RuntimeError, AttributeError):
            return None
        return path

    def _where(self) -> str:
        """Return where the main thread stands."""
        return where(sys._current_frames().get(self._main))


def where(frame: FrameType | None) -> str:
    """Return the innermost function of a stack, and the innermost of this package if that is another."""
    if frame is None:
        return "no longer there"
    innermost, own = _name_of(frame), frame
    while own is not None and not own.f_code.co_filename.startswith(_PACKAGE):
        own = own.f_back
    return innermost if own is None or own is frame else f"{innermost}, called from {_name_of(own)}"


def describe(answers: dict[int, dict[str, Any]], world_size: int) -> list[str]:
    """Return where the ranks stand, a line for each place, those with the fewest ranks first.

    answers: by rank, of those that answered.
    """
    lines, places = [], {}
    if missing := _missing(answers, world_size):
        lines.append(f"{_ranks(missing)} did not answer: stopped, or the machine is gone")
    for rank, answer in answers.items():
        places.setdefault((answer["place"], answer["where"]), []).append(rank)
    for (place, at), ranks in sorted(places.items(), key=lambda item: len(item[1])):
        hosts = ", ".join(dict.fromkeys(answers[rank]["host"] for rank in ranks))
        lines.append(f"{_ranks(ranks)} ({hosts}), {place}: in {at}")
    return lines


def _print(message: str) -> None:
    """Print at once, whatever lock the main thread may hold."""
    with contextlib.suppress(OSError):
        os.write(2, f"\nraptr_ds: hung: {message}\n".encode())


def _missing(answers: dict[int, Any], world_size: int) -> list[int]:
    return [rank for rank in range(world_size) if rank not in answers]


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {listed(ranks)}"


def _name_of(frame: FrameType) -> str:
    parts = Path(frame.f_code.co_filename).parts
    return f"{frame.f_code.co_name} ({'/'.join(parts[-3:])}:{frame.f_lineno})"
