"""What a run of a comparison has left in its folder: how far it is, how its process ended, how long its steps take."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from raptr_ds.atomic_file import write_atomically
from raptr_ds.checkpoint.folder import CHECKPOINTS, checkpoints_in, step_of
from raptr_ds.config.differences import differences
from raptr_ds.errors import DataError, Exit
from raptr_ds.json_text import parse_json
from raptr_ds.runtime.metrics_file import METRICS, read_metrics

LOG = "log.txt"
OUTCOME = "outcome.json"
_LOG_LINES = 15
_IRRELEVANT = (
    "raptr_ds.train.save",
    "raptr_ds.log.",
    "raptr_ds.checkpoint.",
    "raptr_ds.data.num_workers",
    "raptr_ds.data.prefetch",
)
"""Keys of a run file that do not change what a run measures."""


@dataclass(frozen=True)
class RunStatus:
    """How far a run is.

    last_step: of its training lines; checkpoint_step: where it would continue, 0 for the start; eval_loss: of the full
    model after the last step, None without one; differences: keys that differ between the folder's run and the plan.
    """

    num_steps: int
    last_step: int = 0
    checkpoint_step: int = 0
    eval_loss: float | None = None
    is_evaluated: bool = False
    differences: tuple[str, ...] = ()

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to run. Checkpoints do not count: a comparison does not need them."""
        return self.last_step >= self.num_steps and self.is_evaluated

    @property
    def summary(self) -> str:
        """The status in a few words."""
        if self.is_finished:
            return "finished"
        if not self.last_step:
            return "new"
        where = f"continues after {self.checkpoint_step}" if self.checkpoint_step else "starts again"
        return f"stopped at {self.last_step}, {where}"


def status_of(folder: Path, planned: Mapping[str, Any]) -> RunStatus:
    """Return how far the run in a folder is; `planned` is its resolved configuration (RunConfig.resolved).

    Raises: DataError if its metrics or its config.json are damaged.
    """
    block = planned["raptr_ds"]
    num_steps, num_layers = block["train"]["steps"], block["model"]["num_layers"]
    metrics, last = read_metrics(folder / METRICS), (num_steps, num_layers)
    last_step = max(metrics.training, default=0)
    is_evaluated = last in metrics.evaluations or not block["eval"]["batches"]
    found = checkpoints_in(folder / CHECKPOINTS)
    checkpoint_step = (step_of(found[0]) or 0) if found else 0
    changed, config = {}, folder / "config.json"
    if (last_step or checkpoint_step) and config.exists():
        changed = differences(_read_object(config), planned, _IRRELEVANT)
    words = tuple(f"{key}={old!r}, now {new!r}" for key, (old, new) in changed.items())
    return RunStatus(num_steps, last_step, checkpoint_step, metrics.evaluations.get(last), is_evaluated, words)


@dataclass(frozen=True)
class Outcome:
    """How a run's process ended: the exit code of its last start, and the seconds and number of all its starts."""

    exit_code: int | None = None
    wall_seconds: float | None = None
    starts: int = 0

    @property
    def has_failed(self) -> bool:
        """Whether that was a failure: neither its end nor a stop after which it continues."""
        return self.exit_code not in {None, int(Exit.DONE), int(Exit.CONTINUE_LATER)}


def outcome_of(folder: Path) -> Outcome:
    """Return how the run in a folder ended; empty where it never ended, or a cluster ran it.

    Raises: DataError if its outcome.json is damaged.
    """
    file = folder / OUTCOME
    return Outcome(**_read_object(file, asdict(Outcome()))) if file.exists() else Outcome()


def add_start(folder: Path, exit_code: int, seconds: float) -> None:
    """Record the end of one more start of a run in its outcome.json."""
    before = outcome_of(folder)
    after = Outcome(exit_code, (before.wall_seconds or 0.0) + seconds, before.starts + 1)
    write_atomically(folder / OUTCOME, json.dumps(asdict(after)) + "\n")


def _read_object(file: Path, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the JSON object in a file; known: all keys that it may have. Raises: DataError."""
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        content, why = None, str(error)
    else:
        why = "it is not what a run or this tool writes there"
    if not isinstance(content, dict) or (known is not None and not content.keys() <= known.keys()):
        raise DataError(f"{file} is damaged ({why}). Restore it, or remove it: the run's metrics do not depend on it.")
    return content


def last_log_lines(folder: Path) -> list[str]:
    """Return the end of a run's log without empty lines; none where a cluster keeps the log."""
    log = folder / LOG
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return [line.rstrip() for line in text.splitlines() if line.strip()][-_LOG_LINES:]


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step as a linear function of the path's length."""

    seconds: float
    seconds_per_layer: float

    def of_run(self, num_steps: int, num_active_layers: float) -> float:
        """Return the seconds of a run's steps; num_active_layers is the sum of all path lengths."""
        return self.seconds * num_steps + self.seconds_per_layer * num_active_layers


def measured_step_time(folder: Path) -> StepTime:
    """Fit the step time of a short run: medians by path length, weighted by their number of steps.

    The first fifth of the steps is warm-up and left out. If there is one length only, or noise makes longer paths
    faster, the time does not depend on the length.
    """
    lines = list(read_metrics(folder / METRICS).training.values())
    lines = lines[len(lines) // 5 :]
    assert lines, f"{folder} has no training lines"
    seconds: dict[float, list[float]] = {}
    for line in lines:
        seconds.setdefault(line["path_length"], []).append(line["step_seconds"])
    lengths = np.array(list(seconds), dtype=float)
    medians = np.array([median(samples) for samples in seconds.values()])
    weights = np.array([len(samples) for samples in seconds.values()], dtype=float)
    center, mean = np.average(lengths, weights=weights), np.average(medians, weights=weights)
    spread = float((weights * (lengths - center) ** 2).sum())
    slope = float((weights * (lengths - center) * (medians - mean)).sum()) / spread if spread else 0.0
    if slope <= 0 or mean - slope * center < 0:
        return StepTime(float(mean), 0.0)
    return StepTime(float(mean - slope * center), slope)
