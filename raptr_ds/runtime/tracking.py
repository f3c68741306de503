"""Weights & Biases and MLflow: sinks whose server may be slow, or away for hours, without a step noticing.

A thread for each does all that needs its server, the connection included; records wait in memory meanwhile. A file in
the run's folder keeps which run of the server this is, so that a resume continues it.
"""

import contextlib
import hashlib
import importlib
import json
import re
import secrets
import sys
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raptr_ds.atomic_file import write_atomically
from raptr_ds.config.sections import LogSection
from raptr_ds.errors import ConfigError
from raptr_ds.json_text import parse_json
from raptr_ds.runtime.sinks import scalars_of

TRACKING = "tracking_{}.json"
"""A file for each package: their threads write at the same time."""

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 60.0  # between two attempts
_CLOSE_SECONDS = 20.0
_LATE_STEP = "tasks/step"


class Tracker(ABC):
    """A tracking server's client; `connect`, `log` and `finish` may raise anything, and are called in one thread.

    section: the run file's. run_id: which run there this one is, kept in the run's folder with its `place`; None until
    it has begun, for a resumed run that was somewhere else, and in a copy of a run's folder.
    Raises: ConfigError if the package is missing.
    """

    name: str
    package: str

    def __init__(self, section: Any, folder: Path, is_resumed: bool) -> None:
        self.library = _import(self.package)
        self.section, self.folder = section, folder
        self._where, self._here = self.place(), str(folder.resolve())
        known = self._kept_in(folder) if is_resumed else {}
        is_continued = known.get("where") == self._where and not self._is_copy(known)
        self.run_id: str | None = known.get("id") if is_continued else None

    def keep(self, run_id: str) -> None:
        """Keep the id for a resume; without a disk that takes it, the resume begins another run there."""
        self.run_id = run_id
        kept = {"id": run_id, "where": self._where, "folder": self._here}
        with contextlib.suppress(OSError):
            write_atomically(self.folder / TRACKING.format(self.package), json.dumps(kept, indent=2) + "\n")

    def _kept_in(self, folder: Path) -> dict[str, Any]:
        try:
            known = parse_json((folder / TRACKING.format(self.package)).read_text())
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    def _is_copy(self, known: dict[str, Any]) -> bool:
        """Return whether this is a copy of a run's folder, which is still there to continue that run."""
        folder = known.get("folder", self._here)
        return folder != self._here and self._kept_in(Path(str(folder))).get("id") == known.get("id")

    @abstractmethod
    def place(self) -> list[str | None]:
        """Return what names the place of runs there, without asking the server."""

    @abstractmethod
    def connect(self) -> None:
        """Begin the run there, or continue it."""

    @abstractmethod
    def log(self, scalars: Mapping[str, float], step: int, is_late: bool) -> None:
        """Record numbers of a 1-based step; is_late: later ones were recorded before."""

    @abstractmethod
    def finish(self) -> None:
        """End the run there; wait for its upload."""


class TrackerSink:
    """Passes records on to a tracker, in order; those that it does not take are tried again."""

    is_part_of_run = False

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._waiting: deque[Mapping[str, Any]] = deque()  # lines of metrics.jsonl
        self._changed = threading.Condition()
        self._is_closing = False
        self.failure: str | None = None
        self._thread = threading.Thread(target=self._serve, name=f"tracking-{tracker.name}", daemon=True)
        self._thread.start()

    def record(self, line: Mapping[str, Any]) -> None:
        """Take a line, if it has numbers to show."""
        if scalars_of(line):
            with self._changed:
                self._waiting.append(line)
                self._changed.notify()

    def rewind(self, step: int) -> None:
        """Drop what waits of later steps; what the server has stays there."""
        with self._changed:
            self._waiting = deque(line for line in self._waiting if line["step"] <= step)

    def sync(self) -> None:
        """Do nothing: the thread passes records on as fast as it can."""

    def close(self) -> None:
        """Wait some seconds for what is waiting, and end the run there; `failure` names what did not arrive."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive() and self.failure is None:
            self.failure = f"{self._tracker.name}: no answer within {_CLOSE_SECONDS:g} s"

    def _serve(self) -> None:
        is_connected, pause = False, _FIRST_PAUSE_SECONDS
        while (line := self._next()) is not None:
            try:
                if not is_connected:
                    self._tracker.connect()
                    is_connected = True
                self._tracker.log(scalars_of(line), line["step"], is_late="tasks" in line)
            except Exception as error:  # a client's library may raise anything, and training does not depend on it
                lines = str(error).strip().splitlines() or [type(error).__name__]
                self.failure = f"{self._tracker.name}: {lines[0]}"
                with self._changed:
                    if self._is_closing:  # it was tried once more
                        return
                    self._changed.wait_for(lambda: self._is_closing, pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
                continue
            with self._changed:
                if self._waiting and self._waiting[0] is line:  # not dropped meanwhile
                    self._waiting.popleft()
            self.failure, pause = None, _FIRST_PAUSE_SECONDS
        if is_connected:
            with contextlib.suppress(Exception):
                self._tracker.finish()

    def _next(self) -> Mapping[str, Any] | None:
        """Wait for a line and return it; None when there is no more to come."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closing)
            return self._waiting[0] if self._waiting else None


class WandbTracker(Tracker):
    """A run of Weights & Biases; offline it is written into the run's folder, for `wandb sync`."""

    name, package = "Weights & Biases", "wandb"

    def place(self) -> list[str | None]:
        """Return the user or team, and the project."""
        return [self.section.entity, self.section.project]

    def connect(self) -> None:
        """Begin the run, or continue it."""
        section = self.section
        optional = {key: value for key in ("entity", "group") if (value := getattr(section, key)) is not None}
        self.keep(self.run_id or secrets.token_hex(4))
        self._run = self.library.init(
            project=section.project,
            name=section.name or self.folder.name,
            id=self.run_id,
            resume="allow",
            mode=section.mode,
            dir=str(self.folder),
            **optional,
        )
        self._run.define_metric("tasks/*", step_metric=_LATE_STEP)

    def log(self, scalars: Mapping[str, float], step: int, is_late: bool) -> None:
        """Record numbers; late ones over an axis of their own, as the server ignores steps before the last it has."""
        if is_late:
            self._run.log({**scalars, _LATE_STEP: step}, commit=False)  # at the step that it is at
        else:
            self._run.log(dict(scalars), step=step)

    def finish(self) -> None:
        """Wait for the upload, and end."""
        self._run.finish()


class MlflowTracker(Tracker):
    """A run of MLflow, where the order of steps does not matter."""

    name, package = "MLflow", "mlflow"

    def place(self) -> list[str | None]:
        """Return the server, of the environment's a digest without its password, and the experiment."""
        server = self.section.tracking_uri
        if server is None:
            bare = re.sub("//[^/]*@", "//", self.library.get_tracking_uri())
            server = hashlib.blake2b(bare.encode(), digest_size=8).hexdigest()
        return [server, self.section.experiment]

    def connect(self) -> None:
        """Begin the run, or continue it."""
        section = self.section
        if section.tracking_uri is not None:  # else MLFLOW_TRACKING_URI, or MLflow's own default
            self.library.set_tracking_uri(section.tracking_uri)
        self.library.set_experiment(section.experiment)
        named = {"run_name": section.name or self.folder.name} if self.run_id is None else {"run_id": self.run_id}
        self.keep(self.library.start_run(**named).info.run_id)

    def log(self, scalars: Mapping[str, float], step: int, is_late: bool) -> None:
        """Record numbers of a step; a name that MLflow would refuse (exact_match,strict-match) with underscores."""
        self.library.log_metrics({re.sub(r"[^\w./ :-]", "_", name): scalars[name] for name in scalars}, step=step)

    def finish(self) -> None:
        """End the run."""
        self.library.end_run()


def open_trackers(log: LogSection, folder: Path, resume_step: int) -> list[TrackerSink]:
    """Return a sink for each tracker that the run file asks for. Raises: ConfigError if its package is missing."""
    wanted = ((WandbTracker, log.wandb), (MlflowTracker, log.mlflow))
    trackers = [kind(section, folder, resume_step > 0) for kind, section in wanted if section is not None]
    return [TrackerSink(tracker) for tracker in trackers]


def _import(package: str) -> Any:
    if sys.modules.get(package, True) is None:  # kept from DeepSpeed (parallel/launch.py)
        del sys.modules[package]
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"raptr_ds.log.{package} needs the {package} package, which cannot be imported ({error}). Install it (pip "
            f"install {package}), or remove raptr_ds.log.{package}."
        ) from error
