"""TensorBoard events of a run."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raptr_ds.errors import ConfigError

_TRAINING_TAGS = {
    "loss": "train/loss",
    "lr": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "path_length": "path/length",
    "phase": "path/phase",
    "tokens": "progress/tokens",
    "flops": "progress/executed_flops",
    "skipped_steps": "progress/skipped_steps",
    "failed_saves": "progress/failed_saves",
    "step_seconds": "speed/step_seconds",
    "tokens_per_second": "speed/tokens_per_second",
    "mfu": "speed/mfu",
    "slowest_rank": "speed/slowest_rank",
    "slowest_rank_seconds": "speed/slowest_rank_seconds",
    "median_rank_seconds": "speed/median_rank_seconds",
    "host_memory_bytes": "memory/host_bytes",
    "host_memory_peak_bytes": "memory/host_peak_bytes",
    "device_memory_peak_bytes": "memory/device_peak_bytes",
}
_MAX_UNFLUSHED = 2000  # scalars


class TensorBoardSink:
    """Writes the numbers of metrics.jsonl's lines as scalars; unknown ones (null) are left out.

    Scalars that the disk does not take are kept, and written to another event file when it takes them again.
    resume_step: events after it, written before a crash or by an earlier run in the same folder, are purged.
    failure: why scalars wait in memory, None while none do.
    Raises: ConfigError if TensorBoard is not installed; OSError if the folder cannot be written at first.
    """

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "raptr_ds.log.tensorboard=true needs the tensorboard package. Install it (pip install tensorboard), or "
                "set raptr_ds.log.tensorboard to false."
            ) from error
        self._open = lambda purge_step=None: SummaryWriter(str(folder), purge_step=purge_step)
        self._writer: SummaryWriter | None = self._open(resume_step + 1 if resume_step else 0)
        self._unflushed: list[tuple[str, float, int]] = []
        self.failure: str | None = None

    def record_training(self, line: Mapping[str, Any]) -> None:
        """Write the scalars of a training line."""
        self._add([(tag, line[key], line["step"]) for key, tag in _TRAINING_TAGS.items() if line.get(key) is not None])

    def record_evaluation(self, line: Mapping[str, Any]) -> None:
        """Write the loss of an evaluation line, under its path length."""
        self._add([(f"eval/loss_of_{line['path_length']}_layers", line["eval_loss"], line["step"])])

    def rewind(self, step: int) -> None:
        """Purge the events after a 1-based step."""
        self.close()
        self._unflushed = [scalar for scalar in self._unflushed if scalar[2] <= step]
        try:
            self._writer = self._open(step + 1)
        except OSError as error:
            self._give_up(error)

    def flush(self) -> None:
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
        self.flush()
        if self._writer is not None:
            self._writer.close()

    def _add(self, scalars: list[tuple[str, float, int]]) -> None:
        self._unflushed += scalars
        try:
            self._write(scalars)
        except OSError as error:
            self._give_up(error)
        if len(self._unflushed) % _MAX_UNFLUSHED < len(scalars):
            self.flush()

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
