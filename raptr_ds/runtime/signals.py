"""Stop signals: requests to end the run, noticed at any time; the loop acts on them between two steps.

Signals may reach one rank only, so `requested` is this rank's own view; ranks agree on it elsewhere.
This module does not import torch, and a run imports it first: it notices a launcher that dies during the other imports.
"""

import contextlib
import os
import select
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

from raptr_ds.errors import Exit

LONG_WORK_SECONDS = 600.0
"""What a checkpoint or an evaluation may take without a launcher, before the process ends itself or is killed."""
_REPEAT_SECONDS = 2.0
_FORCING = (signal.SIGINT, signal.SIGTERM)


def launcher_chain() -> list[tuple[int, int]]:
    """Return (process, its parent) pairs whose parents must stay for this run to have a launcher.

    The first is this process and its parent. DeepSpeed puts two processes above a worker: `deepspeed` itself, which
    is what people kill, and deepspeed.launcher.launch, which then lives on without noticing (0.19.8, launcher/
    runner.py passes signals on only for PDSH). So above a parent of that kind its own parent is watched as well.
    """
    parent = os.getppid()
    chain = [(os.getpid(), parent)]
    grandparent = _parent_of(parent)
    if b"deepspeed.launcher.launch" in _command_of(parent) and b"deepspeed" in _command_of(grandparent):
        chain.append((parent, grandparent))
    return chain


def stat_fields(process: int) -> list[str]:
    """Return what Linux says of a process in /proc/PROCESS/stat, from its third field, the state, on (proc(5)).

    Nothing if there is no such process, or on another system.
    """
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return stat.rpartition(")")[2].split()


def _parent_of(process: int) -> int:
    if process == os.getpid():
        return os.getppid()
    fields = stat_fields(process)
    return int(fields[1]) if fields else 0


def _command_of(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


# Taken at import: by the time a run has imported torch and DeepSpeed (5 s), its launcher may be gone already.
_CHAIN_AT_IMPORT = launcher_chain()


class StopSignals:
    """Turns SIGTERM, SIGINT, SIGUSR1, SIGHUP and the loss of the launcher into a flag.

    One of the same SIGINT or SIGTERM at least 2 s after the first ends the process at once, without a checkpoint, with
    128 + the signal's number (closer ones are the same request: on Ctrl-C the terminal and the launcher both signal).
    When the launcher is gone nobody is left to kill a rank that hangs in a collective: with no `progressed` call for
    the allowed time, the process ends itself with Exit.FAULT. Use as a context manager, from the main thread.
    reason: what asked first, a signal's name or "launcher gone"; None if nothing did.
    watch_launcher: False for a process started by hand, whose parent is a shell that may well go first (nohup).
    """

    def __init__(self, *, watch_launcher: bool = True, grace_seconds: float = 20.0, poll_seconds: float = 0.5) -> None:
        self._chain = _CHAIN_AT_IMPORT if watch_launcher else []
        self._grace_seconds = grace_seconds
        self._poll_seconds = poll_seconds
        self.reason: str | None = None
        self._first_arrival: dict[int, float] = {}
        self._last_progress: float | None = None
        self._allowed_seconds = grace_seconds
        self._orphaned_at: float | None = None
        self._previous_handlers: dict[int, signal._HANDLER] = {}
        self._closed = threading.Event()
        self._read_end = self._write_end = self._previous_wakeup = -1
        self._watcher: threading.Thread | None = None

    @property
    def requested(self) -> bool:
        """Whether this rank has been asked to stop."""
        return self.reason is not None

    def progressed(self, allow_seconds: float | None = None) -> None:
        """Record that the run is alive; the loop calls this once a step, and before anything that takes long.

        allow_seconds: how long the time to the next call may be without a launcher; by default the grace period, or
        twice the last time between calls if that is more.
        """
        now = time.monotonic()
        last_interval = 0.0 if self._last_progress is None else now - self._last_progress
        self._allowed_seconds = max(self._grace_seconds, allow_seconds or 2 * last_interval)
        self._last_progress = now

    def __enter__(self) -> "StopSignals":
        """Install the handlers and start watching."""
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        # Python runs handlers between two byte codes of the main thread: never while it sits in a collective. The
        # wake-up descriptor is written by the C handler itself, so the watcher learns of a signal at once.
        self._previous_wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup: hanging up must not stop the run
            self._previous_handlers[number] = signal.signal(number, self._handle)
        os.register_at_fork(after_in_child=self._leave_to_parent)
        self._watcher = threading.Thread(target=self._watch, name="stop-signals", daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Restore the previous handlers and stop watching."""
        self._restore_handlers()
        self._closed.set()
        os.write(self._write_end, b"\0")
        if self._watcher is not None:
            self._watcher.join()
        os.close(self._read_end)
        os.close(self._write_end)

    def _restore_handlers(self) -> None:
        signal.set_wakeup_fd(self._previous_wakeup)
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous_handlers = {}

    def _leave_to_parent(self) -> None:
        """In a forked child: signals to it are its own, and must not be written into the parent's pipe."""
        if not self._closed.is_set():
            self._restore_handlers()
            self._closed.set()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._request(signal.Signals(number).name)

    def _request(self, reason: str) -> None:
        if self.reason is None:
            self.reason = reason

    def _watch(self) -> None:
        while not self._closed.is_set():
            ready, _, _ = select.select([self._read_end], [], [], self._poll_seconds)
            for number in os.read(self._read_end, 64) if ready else b"":
                self._arrived(number)
            self._check_launcher()

    def _arrived(self, number: int) -> None:
        if number not in self._previous_handlers:
            return
        now = time.monotonic()
        first = self._first_arrival.setdefault(number, now)
        self._request(signal.Signals(number).name)
        if number in _FORCING and now - first >= _REPEAT_SECONDS:
            exit_now(128 + number, f"second {signal.Signals(number).name}: ending at once, without a checkpoint")

    def _check_launcher(self) -> None:
        now = time.monotonic()
        if self._orphaned_at is None:
            if all(_parent_of(process) == parent for process, parent in self._chain):
                return
            self._orphaned_at = now
            self._request("launcher gone")
        since = max(self._orphaned_at, self._last_progress or 0.0)
        if now - since > self._allowed_seconds:
            exit_now(
                Exit.FAULT, f"launcher gone, and no progress for {now - since:.0f} s: ending this orphaned process"
            )


def exit_now(code: int, message: str) -> NoReturn:
    """End this process without waiting for anybody or anything, with a message on standard error."""
    with contextlib.suppress(OSError):  # the other end of stderr may be gone with the launcher
        os.write(2, f"raptr_ds: process {os.getpid()}: {message}\n".encode())
    os._exit(code)
