"""Where measurements go: what every sink of metrics.jsonl's lines does, and the names that trackers show."""

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
    """Takes metrics.jsonl's lines; an outage ends and blocks nothing.

    failure: why records wait in memory, None while none do. is_part_of_run: whether a run is complete only with all of
    its records there; they can be made again from metrics.jsonl where it is not.
    """

    failure: str | None
    is_part_of_run: bool

    def record(self, line: Mapping[str, Any]) -> None:
        """Take a line; that of scores may have an earlier step than the last line."""
        ...

    def rewind(self, step: int) -> None:
        """Forget what came after a 1-based step, as far as that is possible there."""
        ...

    def sync(self) -> None:
        """Pass on all records, if that does not take long."""
        ...

    def close(self) -> None:
        """Pass on what can be passed on within seconds, and let go."""
        ...


def scalars_of(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a line by name; unknown ones (null) are left out."""
    if "eval_loss" in line:
        return {f"eval/loss_of_{line['path_length']}_layers": line["eval_loss"]}
    if "tasks" in line:
        return {
            f"tasks/{task}/{metric}": value
            for task, scores in line["tasks"].items()
            for metric, value in scores.items()
            if value is not None and metric not in NOT_SCORES
        }
    return {name: line[key] for key, name in TRAINING_NAMES.items() if line.get(key) is not None}
