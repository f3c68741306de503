"""TensorBoard events of a run."""

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
    "step_seconds": "speed/step_seconds",
    "tokens_per_second": "speed/tokens_per_second",
    "mfu": "speed/mfu",
}


class TensorBoardSink:
    """Writes the numbers of metrics.jsonl's lines as scalars; unknown ones (null) are left out.

    resume_step: events after it, written before a crash or by an earlier run in the same folder, are purged.
    Raises: ConfigError if TensorBoard is not installed.
    """

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "raptr_ds.log.tensorboard=true needs the tensorboard package. Install it (pip install tensorboard), or "
                "set raptr_ds.log.tensorboard to false."
            ) from error
        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else 0)

    def record_training(self, line: Mapping[str, Any]) -> None:
        """Write the scalars of a training line."""
        for key, tag in _TRAINING_TAGS.items():
            if line[key] is not None:
                self._writer.add_scalar(tag, line[key], line["step"])

    def record_evaluation(self, line: Mapping[str, Any]) -> None:
        """Write the loss of an evaluation line, under its path length."""
        self._writer.add_scalar(f"eval/loss_of_{line['path_length']}_layers", line["eval_loss"], line["step"])

    def flush(self) -> None:
        """Write all events to disk."""
        self._writer.flush()

    def close(self) -> None:
        """Write the remaining events and close."""
        self._writer.close()
