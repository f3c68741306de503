"""TensorBoard events of a run."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raptr_ds.errors import ConfigError
from raptr_ds.runtime.sinks import scalars_of
from raptr_ds.user_paths import writing

_MAX_UNFLUSHED = 2000  # scalars


class TensorBoardSink:
    """Writes the numbers of metrics.jsonl's lines as scalars; unknown ones (null) are left out.

    Scalars that the disk does not take are kept, and written to another event file when it takes them again.
    folder: the run's. resume_step: events after it, written before a crash or by an earlier run, are purged.
    Raises: ConfigError if TensorBoard is not installed; PathError or StorageError if its folder cannot be written.
    """

    is_part_of_run = True

    def __init__(self, folder: Path, resume_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "raptr_ds.log.tensorboard=true needs the tensorboard package. Install it (pip install tensorboard), or "
                "set raptr_ds.log.tensorboard to false."
            ) from error
        events = folder / "tensorboard"
        self._open = lambda purge_step=None: SummaryWriter(str(events), purge_step=purge_step)
        with writing(events, "Give this user permission to write there."):
            self._writer: SummaryWriter | None = self._open(resume_step + 1 if resume_step else 0)
        self._unflushed: list[tuple[str, float, int]] = []
        self.failure: str | None = None

    def record(self, line: Mapping[str, Any]) -> None:
        """Write the scalars of a line."""
        scalars = [(tag, value, line["step"]) for tag, value in scalars_of(line).items()]
        self._unflushed += scalars
        try:
            self._write(scalars)
        except OSError as error:
            self._give_up(error)
        if len(self._unflushed) % _MAX_UNFLUSHED < len(scalars):
            self.sync()

    def rewind(self, step: int) -> None:
        """Purge the events after a 1-based step."""
        self.close()
        self._unflushed = [scalar for scalar in self._unflushed if scalar[2] <= step]
        try:
            self._writer = self._open(step + 1)
        except OSError as error:
            self._give_up(error)

    def sync(self) -> None:
        """Write all events to disk, as far as it takes them."""
        try:
            if self._writer is None:  # in a new file: the earlier one may end in a part of an event
                self._writer = self._open()
                self._write(self._unflushed)
            self._writer.flush()
        except OSError as error:
            self._give_up(error)
        else:
            self._unflushed, self.failure = [], None

    def close(self) -> None:
        """Write the remaining events, as far as possible, and close."""
        self.sync()
        if self._writer is not None:
            self._writer.close()

    def _write(self, scalars: list[tuple[str, float, int]]) -> None:
        if self._writer is not None:
            for tag, value, step in scalars:
                self._writer.add_scalar(tag, value, step)

    def _give_up(self, error: OSError) -> None:
        self.failure = error.strerror or str(error)
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
        self._writer = None
