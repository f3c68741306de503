"""Where measurements go besides metrics.jsonl: what every such sink does, and the names that all of them show."""

from collections.abc import Mapping
from typing import Any, Protocol

from raptr_ds.runtime.metrics_file import NOT_SCORES

TRAINING_NAMES = {
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


class Sink(Protocol):
    """Shows the numbers of metrics.jsonl's lines; an outage ends and blocks nothing.

    failure: why records wait in memory, None while none do. is_part_of_run: whether a run is complete only with all of
    its records there; they can be made again from metrics.jsonl where it is not.
    """

    failure: str | None
    is_part_of_run: bool

    def record_training(self, line: Mapping[str, Any]) -> None:
        """Take a training line."""
        ...

    def record_evaluation(self, line: Mapping[str, Any]) -> None:
        """Take an evaluation's line."""
        ...

    def record_tasks(self, line: Mapping[str, Any]) -> None:
        """Take a line of scores, whose step may be earlier than that of the last line."""
        ...

    def rewind(self, step: int) -> None:
        """Forget what came after a 1-based step, as far as that is possible there."""
        ...

    def flush(self) -> None:
        """Pass on all records, if that does not take long."""
        ...

    def close(self) -> None:
        """Pass on what can be passed on within seconds, and let go."""
        ...


def training_scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a training line by name; unknown ones (null) are left out."""
    return {name: line[key] for key, name in TRAINING_NAMES.items() if line.get(key) is not None}


def evaluation_scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the loss of an evaluation's line, under its path length."""
    return {f"eval/loss_of_{line['path_length']}_layers": line["eval_loss"]}


def task_scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores of a line of downstream tasks, under task and metric; unknown ones are left out."""
    return {
        f"tasks/{task}/{metric}": value
        for task, scores in line["tasks"].items()
        for metric, value in scores.items()
        if value is not None and metric not in NOT_SCORES
    }
