"""One run at a time works in a folder: a lock that names its holder, and that a dead holder does not keep.

No clocks are compared and no lock service is needed, so it works on file systems that machines share. The holder writes
a number, its beat, every few seconds. A lock whose beat does not change while somebody watches it is of a run that is
gone, and is taken over.
"""

import contextlib
import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from raptr_ds.atomic_file import write_atomically
from raptr_ds.errors import ConfigError, Exit
from raptr_ds.json_text import parse_json
from raptr_ds.parallel.launch import Launch
from raptr_ds.runtime.signals import exit_now, stat_fields
from raptr_ds.user_paths import make_folder, writing

LOCK = "run.lock"
BEAT_SECONDS = 10.0
STALE_SECONDS = 45.0
_LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Holder:
    """Who works in a folder.

    key: of this start, different for every one. machine: which kernel and which numbering of processes; process_start:
    in ticks since the machine started, as a process's number is used again. job: Slurm's, empty elsewhere; restart: how
    often Slurm has started it again.
    """

    key: str
    host: str
    machine: str
    process: int
    process_start: str
    job: str
    restart: int
    since: str

    @staticmethod
    def of(launch: Launch) -> "Holder":
        """Describe this process."""
        return Holder(
            key=uuid4().hex,
            host=socket.gethostname(),
            machine=_machine(),
            process=os.getpid(),
            process_start=_start_of(os.getpid()),
            job=launch.slurm_job,
            restart=launch.slurm_restarts,
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
        )

    def is_running(self, observer: "Holder") -> bool | None:
        """Return whether the process runs, None where `observer` has to watch the lock to find out."""
        if self.machine and self.machine == observer.machine:
            return _start_of(self.process) == self.process_start
        is_requeued = self.job and self.job == observer.job and self.restart != observer.restart
        return False if is_requeued else None

    def __str__(self) -> str:
        """Describe the holder in a message."""
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.process} on {self.host}{job}, since {self.since}"


class RunLock:
    """Holds a run's folder from its making to `release`.

    Ends the process when another run has taken the lock over, as it may after this one stood still: nothing more may be
    written then.
    Raises: ConfigError naming the holder if another run works in the folder; PathError or StorageError if the folder
    cannot be written.
    """

    def __init__(self, folder: Path, launch: Launch) -> None:
        self._path = folder / LOCK
        self._holder, self._beat = Holder.of(launch), 0
        make_folder(folder)
        with writing(folder):
            self._acquire()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="run-lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the folder back; where the disk does not let go of the lock, later runs see that its holder is gone."""
        self._released.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            found = _read(self._path)
            if found is not None and found[0] == self._holder:
                self._path.unlink(missing_ok=True)

    def _acquire(self) -> None:
        while not self._create():
            found = _read(self._path)
            if found is None:  # released in between
                continue
            holder, _ = found
            is_running = None if holder is None else holder.is_running(self._holder)
            if is_running is None:
                is_running = self._changes(found)
            if is_running and holder is not None:  # else it is being written
                raise ConfigError(
                    f"another run works in {self._path.parent}: {holder}. Two would delete each other's "
                    "checkpoints. Set raptr_ds.train.save to another folder, or wait for that run to end."
                )
            if not is_running:
                self._remove(found)

    def _create(self) -> bool:
        """Return whether the lock is this run's now."""
        try:
            with self._path.open("x") as stream:
                stream.write(self._content())
        except FileExistsError:
            return False
        return True

    def _changes(self, found: tuple[Holder | None, str]) -> bool:
        """Watch the lock; return whether it changes, as it does while its holder lives."""
        end = time.monotonic() + STALE_SECONDS
        while time.monotonic() < end:
            time.sleep(_LOOK_SECONDS)
            if _read(self._path) != found:
                return True
        return False

    def _remove(self, found: tuple[Holder | None, str]) -> None:
        """Remove the lock of a run that is gone, unless another process was faster and holds it by now."""
        aside = self._path.with_name(f"{LOCK}.{self._holder.key}")
        try:
            self._path.rename(aside)
        except FileNotFoundError:
            return
        if _read(aside) != found:  # the faster one's: put it back, as long as no third has come
            with contextlib.suppress(FileExistsError):
                os.link(aside, self._path)
        aside.unlink(missing_ok=True)

    def _keep_beating(self) -> None:
        beaten = time.monotonic()
        while not self._released.wait(BEAT_SECONDS):
            try:
                found = _read(self._path)
                if found is None:  # who took the lock of a run that had no beat may have ended and released it by now
                    other = "another run" if time.monotonic() - beaten > STALE_SECONDS else None
                else:
                    other = None if found[0] == self._holder else found[0]
                if other is not None:
                    taken = f"{other} has taken {self._path.parent} over while this run stood still"
                    exit_now(Exit.FAULT, f"{taken}: ending at once, without writing anything")
                self._beat += 1
                write_atomically(self._path, self._content())
                beaten = time.monotonic()
            except OSError:  # a full disk: whoever watches sees no beat, and this process if it is on its machine
                continue

    def _content(self) -> str:
        return json.dumps({"beat": self._beat, **asdict(self._holder)}) + "\n"


def holder_in(folder: Path) -> Holder | None:
    """Return who holds a run's folder; None if nobody does, or the lock cannot be read."""
    try:
        found = _read(folder / LOCK)
    except (OSError, ValueError):  # ValueError: a NUL byte in the path
        return None
    return None if found is None else found[0]


def _read(path: Path) -> tuple[Holder | None, str] | None:
    """Return the holder, None where it cannot be read, and the lock's text; None without a lock."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    try:
        content: dict[str, Any] = parse_json(text)
        content.pop("beat")
        return Holder(**content), text
    except (ValueError, TypeError, KeyError, AttributeError):
        return None, text


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return ""


def _start_of(process: int) -> str:
    """Return when a process of this machine started, an empty string if there is none of this number."""
    fields = stat_fields(process)
    return fields[19] if fields and fields[0] != "Z" else ""
