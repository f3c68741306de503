"""One try: a launcher's command that runs while signals reach it and its reports of failed tasks are read."""

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from raptr_ds.supervise.policy import Ending, Failure

_REQUESTS = frozenset({signal.SIGUSR1, signal.SIGTERM, signal.SIGINT})
_WAITED = _REQUESTS | {signal.SIGHUP, signal.SIGCHLD}

_SRUN = re.compile(r"srun: error: (\S+): tasks? [\d,-]+: (?:Exited with exit code (\d+)|(.+))")
_LOST_NODE = re.compile(r"srun: error: Node failure on (\S+)")
_TORCHRUN = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: \d+")
_PR_SET_CHILD_SUBREAPER = 36
_PORT_TAKEN = re.compile(r"EADDRINUSE|address already in use", re.IGNORECASE)
_FOLDER_IN_USE = re.compile(r"raptr_ds: ConfigError: another run works in")  # raptr_ds/runtime/run_lock.py
_NO_SCRIPT = re.compile(r"can't open file")  # Python, with exit code 2


class StopRequests:
    """The signals that ask this process to stop: blocked from its making on, and waited for, so that none is lost."""

    def __init__(self) -> None:
        is_hang_up_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # nohup
        self._listened = _WAITED - {signal.SIGHUP} if is_hang_up_ignored else _WAITED
        signal.pthread_sigmask(signal.SIG_BLOCK, self._listened)
        # A child must not inherit that they are ignored, as a batch script makes them at first.
        for number in _REQUESTS:
            signal.signal(number, signal.SIG_DFL)
        self.requested = False

    def wait(self, seconds: float) -> signal.Signals | None:
        """Wait for a request, the end of a child, or the time; return the request's signal, None if it was none."""
        info = signal.sigtimedwait(self._listened, seconds)
        if info is None or info.si_signo == signal.SIGCHLD:
            return None
        self.requested = True
        return signal.Signals(info.si_signo)

    def sleep(self, seconds: float) -> bool:
        """Wait for the whole time; return False, early, on a request to stop."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if self.wait(left) is not None:
                return False
        return True


class Reports:
    """What a launcher and its tasks printed: the failed tasks, in this order, and causes that no exit code shows.

    folder_in_use: by another run; no_script: Python could not open the file that it was to run.
    """

    def __init__(self) -> None:
        self.failures: list[Failure] = []
        self.port_taken = False
        self.folder_in_use = False
        self.no_script = False

    def read(self, line: str) -> None:
        """Take note of one line of standard error."""
        self.port_taken = self.port_taken or _PORT_TAKEN.search(line) is not None
        self.folder_in_use = self.folder_in_use or _FOLDER_IN_USE.search(line) is not None
        self.no_script = self.no_script or _NO_SCRIPT.search(line) is not None
        if match := _SRUN.search(line):
            code = int(match[2]) if match[2] else None
            self.failures.append(Failure(_one(match[1]), code, match[3] or f"exit code {code}"))
        elif match := _LOST_NODE.search(line):
            self.failures.append(Failure(_one(match[1]), None, "node failure"))
        elif match := _TORCHRUN.search(line):
            code = int(match[1])
            self.failures.append(Failure(socket.gethostname(), code if code >= 0 else None, f"exit code {code}"))


def run_command(
    words: Sequence[str],
    env: Mapping[str, str],
    stops: StopRequests,
    on_stop: Callable[[subprocess.Popen[bytes], signal.Signals | None], None],
) -> Ending:
    """Run a command to its end.

    on_stop: called with every request to stop, and from the first one on at least every second with None.
    """
    reports = Reports()
    try:
        child = subprocess.Popen(
            words,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            process_group=0,  # Ctrl-C comes from here, once, and not from the terminal too
            preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, _WAITED),  # noqa: PLW1509  (no thread yet)
        )
    except OSError as error:
        return Ending(127, [Failure(None, 127, f"{words[0]} cannot be started: {error.strerror}")])
    copier = threading.Thread(target=_copy, args=(child, reports), daemon=True)
    copier.start()
    while child.poll() is None:
        asked = stops.wait(1.0)
        if stops.requested and child.poll() is None:
            on_stop(child, asked)
    copier.join(5)  # a process that outlives the launcher may hold the pipe open
    code = child.returncode if child.returncode >= 0 else 128 - child.returncode
    return Ending(
        code, tuple(reports.failures), stops.requested, reports.port_taken, reports.folder_in_use, reports.no_script
    )


def print_error(content: bytes) -> None:
    """Write to standard error. What it does not take, on a full disk or without a reader, is lost and ends nothing.

    Nothing is kept for later either: Python would try that once more at its end, and replace the exit code by 120.
    """
    with contextlib.suppress(OSError):
        while content:
            content = content[os.write(2, content) :]


def adopt_orphans() -> None:
    """Become the parent of all processes below this one whose parents end (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def await_orphans(seconds: float, stops: StopRequests) -> int:
    """Wait until no adopted process is left, or for the time; return the number of those that are.

    A request to stop is passed on to them.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            is_gone, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return 0
        if is_gone:
            continue
        if time.monotonic() > deadline:
            return len(_children())
        if (asked := stops.wait(0.1)) is not None:
            for child in _children():
                os.kill(child, asked)  # not reaped yet, so the number is still its own


def end_orphans(seconds: float, stops: StopRequests) -> int:
    """Wait until no adopted process is left; kill those that stay longer, and return their number.

    Those that are stopped (SIGSTOP) are continued first: they can neither save nor leave.
    """
    for child in _children():
        os.kill(child, signal.SIGCONT)
    killed: set[int] = set()
    while await_orphans(0.1 if killed else seconds, stops):
        for child in _children():
            os.kill(child, signal.SIGKILL)
            killed.add(child)
    return len(killed)


def _children() -> list[int]:
    return [int(child) for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def _copy(child: subprocess.Popen[bytes], reports: Reports) -> None:
    assert child.stderr is not None
    rest = b""
    while chunk := os.read(child.stderr.fileno(), 1 << 16):
        print_error(chunk)
        *lines, rest = (rest[-4096:] + chunk).split(b"\n")
        for line in lines:
            reports.read(line.decode(errors="replace"))
    reports.read(rest.decode(errors="replace"))


def _one(nodes: str) -> str | None:
    return None if "[" in nodes or "," in nodes else nodes
