"""Weights & Biases and MLflow: sinks whose server may be slow, or away for hours, without a step noticing.

A thread for each does all that needs its server, the connection included; records wait in memory meanwhile. A file in
the run's folder keeps which run of the server this is, so that a resume continues it.
"""

import contextlib
import importlib
import json
import secrets
import sys
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from raptr_ds.atomic_file import write_atomically
from raptr_ds.config.sections import LogSection, MlflowSection, WandbSection
from raptr_ds.errors import ConfigError
from raptr_ds.runtime.sinks import scalars_of

TRACKING = "tracking_{}.json"
"""A file for each package: their threads write at the same time."""

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 60.0  # between two attempts
_CLOSE_SECONDS = 20.0
_LATE_STEP = "tasks/step"


class Tracker(Protocol):
    """A tracking server's client. Its methods may raise anything, and are called in one thread."""

    name: str

    def connect(self) -> None:
        """Begin a run there, or continue it."""
        ...

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """Record numbers of a 1-based step."""
        ...

    def log_late(self, scalars: Mapping[str, float], step: int) -> None:
        """Record numbers of a step that later ones were recorded after."""
        ...

    def finish(self) -> None:
        """End the run there."""
        ...


@dataclass(frozen=True, eq=False)
class _Record:
    scalars: dict[str, float]
    step: int
    is_late: bool


class TrackerSink:
    """Passes records on to a tracker, in order; those that it does not take are tried again."""

    is_part_of_run = False

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._waiting: deque[_Record] = deque()
        self._changed = threading.Condition()
        self._is_closing = False
        self.failure: str | None = None
        self._thread = threading.Thread(target=self._serve, name=f"tracking-{tracker.name}", daemon=True)
        self._thread.start()

    def record(self, line: Mapping[str, Any]) -> None:
        """Take a line, if it has numbers to show."""
        if scalars := scalars_of(line):
            with self._changed:
                self._waiting.append(_Record(scalars, line["step"], is_late="tasks" in line))
                self._changed.notify()

    def rewind(self, step: int) -> None:
        """Drop what waits of later steps; what the server has stays there."""
        with self._changed:
            kept = [record for record in self._waiting if record.step <= step]
            self._waiting.clear()
            self._waiting.extend(kept)

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
        while (record := self._next()) is not None:
            try:
                if not is_connected:
                    self._tracker.connect()
                    is_connected = True
                log = self._tracker.log_late if record.is_late else self._tracker.log
                log(record.scalars, record.step)
            except Exception as error:  # a client's library may raise anything, and training does not depend on it
                lines = str(error).strip().splitlines() or [type(error).__name__]
                self.failure = f"{self._tracker.name}: {lines[0]}"
                if not self._pause(pause):
                    return
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
                continue
            with self._changed:
                if self._waiting and self._waiting[0] is record:  # not dropped meanwhile
                    self._waiting.popleft()
            self.failure, pause = None, _FIRST_PAUSE_SECONDS
        if is_connected:
            with contextlib.suppress(Exception):
                self._tracker.finish()

    def _next(self) -> _Record | None:
        """Wait for a record and return it; None when there is no more to come."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closing)
            return self._waiting[0] if self._waiting else None

    def _pause(self, seconds: float) -> bool:
        """Wait after a failure; return whether to try again: once more when closing begins, and then never."""
        with self._changed:
            if self._is_closing:
                return False
            self._changed.wait_for(lambda: self._is_closing, seconds)
            return True


class WandbTracker:
    """A run of Weights & Biases; offline it is written into the run's folder, for `wandb sync`."""

    name = "Weights & Biases"

    def __init__(self, section: WandbSection, folder: Path, is_resumed: bool) -> None:
        self._wandb = _import("wandb")
        self._section, self._folder = section, folder
        self._memory = _RunIds(folder, "wandb", [section.entity, section.project], is_resumed)
        self._id = self._memory.id or secrets.token_hex(4)
        self._run: Any = None

    def connect(self) -> None:
        """Begin the run, or continue it."""
        section = self._section
        optional = {key: value for key in ("entity", "group") if (value := getattr(section, key)) is not None}
        self._memory.keep(self._id)
        self._run = self._wandb.init(
            project=section.project,
            name=section.name or self._folder.name,
            id=self._id,
            resume="allow",
            mode=section.mode,
            dir=str(self._folder),
            **optional,
        )
        self._run.define_metric("tasks/*", step_metric=_LATE_STEP)

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """Record numbers of a step; the server ignores steps before the last that it has."""
        self._run.log(dict(scalars), step=step)

    def log_late(self, scalars: Mapping[str, float], step: int) -> None:
        """Record numbers over an axis of their own: at an earlier step they would be ignored."""
        self._run.log({**scalars, _LATE_STEP: step}, commit=False)  # at the step that it is at

    def finish(self) -> None:
        """Wait for the upload, and end."""
        self._run.finish()


class MlflowTracker:
    """A run of MLflow."""

    name = "MLflow"

    def __init__(self, section: MlflowSection, folder: Path, is_resumed: bool) -> None:
        self._mlflow = _import("mlflow")
        self._section, self._folder = section, folder
        self._memory = _RunIds(folder, "mlflow", [section.tracking_uri, section.experiment], is_resumed)

    def connect(self) -> None:
        """Begin the run, or continue it."""
        section = self._section
        if section.tracking_uri is not None:  # else MLFLOW_TRACKING_URI, or a folder, as MLflow has it
            self._mlflow.set_tracking_uri(section.tracking_uri)
        self._mlflow.set_experiment(section.experiment)
        if self._memory.id is not None:
            self._mlflow.start_run(run_id=self._memory.id)
        else:
            run = self._mlflow.start_run(run_name=section.name or self._folder.name)
            self._memory.keep(run.info.run_id)

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """Record numbers of a step."""
        self._mlflow.log_metrics(dict(scalars), step=step)

    def log_late(self, scalars: Mapping[str, float], step: int) -> None:
        """Record numbers of a step: the order does not matter there."""
        self.log(scalars, step)

    def finish(self) -> None:
        """End the run."""
        self._mlflow.end_run()


class _RunIds:
    """The id of a tracker's run, kept in the run's folder with where that run is.

    id: that of a resumed run, None if there is none or it is somewhere else.
    """

    def __init__(self, folder: Path, tracker: str, where: list[str | None], is_resumed: bool) -> None:
        self._path, self._where = folder / TRACKING.format(tracker), where
        known = self._read()
        self.id: str | None = known.get("id") if is_resumed and known.get("where") == where else None

    def keep(self, run_id: str) -> None:
        """Keep the id for a resume; without a disk that takes it, the resume begins another run there."""
        self.id = run_id
        known = {"id": run_id, "where": self._where}
        with contextlib.suppress(OSError):
            write_atomically(self._path, json.dumps(known, indent=2) + "\n")

    def _read(self) -> dict[str, Any]:
        try:
            known = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}


def open_trackers(log: LogSection, folder: Path, resume_step: int) -> list[TrackerSink]:
    """Return a sink for each tracker that the run file asks for. Raises: ConfigError if its package is missing."""
    trackers: list[Tracker] = []
    if log.wandb is not None:
        trackers.append(WandbTracker(log.wandb, folder, resume_step > 0))
    if log.mlflow is not None:
        trackers.append(MlflowTracker(log.mlflow, folder, resume_step > 0))
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
