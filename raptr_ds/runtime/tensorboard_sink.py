"""TensorBoard events of a run."""

import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raptr_ds.errors import ConfigError
from raptr_ds.runtime.lines_file import LinesFile
from raptr_ds.runtime.sinks import scalars_of
from raptr_ds.user_paths import writing


class TensorBoardSink(LinesFile):
    """Appends the numbers of metrics.jsonl's lines to an event file of this start; unknown ones (null) are left out.

    folder: the run's. resume_step: events after it, written before a crash or by an earlier run, are purged.
    Raises: ConfigError if TensorBoard is not installed; PathError or StorageError if its folder cannot be written.
    """

    is_part_of_run = True

    def __init__(self, folder: Path, resume_step: int) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            raise ConfigError(
                "raptr_ds.log.tensorboard=true needs the tensorboard package. Install it (pip install tensorboard), or "
                "set raptr_ds.log.tensorboard to false."
            ) from error
        self._events: Any = event_pb2
        self._summaries: Any = summary_pb2
        self._record_writer: Any = RecordWriter
        events = folder / "tensorboard"
        with writing(events, "Give this user permission to write there."):
            events.mkdir(parents=True, exist_ok=True)
            # TensorBoard reads the files in the order of their names.
            super().__init__(events / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}")
        self._add(file_version="brain.Event:2")
        self.rewind(resume_step or -1)

    def record(self, line: Mapping[str, Any]) -> None:
        """Write the scalars of a line."""
        summary = self._summaries.Summary()
        for tag, value in scalars_of(line).items():
            summary.value.add(tag=tag, simple_value=value)
        if summary.value:
            self._add(step=line["step"], summary=summary)

    def rewind(self, step: int) -> None:
        """Purge the events after a 1-based step."""
        self._add(step=step + 1, session_log=self._events.SessionLog(status=self._events.SessionLog.START))

    def _add(self, **fields: Any) -> None:
        record, event = io.BytesIO(), self._events.Event(wall_time=time.time(), **fields)
        self._record_writer(record).write(event.SerializeToString())
        self.append(record.getvalue())
