"""metrics.jsonl: the file that a run's measurements are written to and read from, one JSON object a line.

- A line is whole if it ends with a newline and is a JSON object with an integer `step` (1-based). The last line may be
  damaged, as a run may be writing it or may have died in it: readers ignore it, a resume removes it.
- A training line has `loss`; an evaluation's line has `eval_loss` and `path_length`; a line with `tasks` has the scores
  of the export of its step, and stands behind those of later steps.
- A resume removes the lines after its step, and that of another corpus of a start from there which saved nothing; a
  rollback moves those after its step to metrics.rolled_back.jsonl.
- Of several lines for one step (and path length, for evaluations) the last counts.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raptr_ds.atomic_file import write_atomically
from raptr_ds.errors import DataError
from raptr_ds.json_text import parse_json
from raptr_ds.runtime.lines_file import LinesFile
from raptr_ds.user_paths import writing

METRICS = "metrics.jsonl"
STDERR = "_stderr"
"""What is behind the name of a metric of a task in that of its standard error."""
NOT_SCORES = {"shots"}
"""What stands beside the metrics of a task."""
ROLLED_BACK = "metrics.rolled_back.jsonl"

Scores = dict[str, dict[str, float | None]]
"""Numbers by task and metric, as lm-evaluation-harness names them; None for one that is not finite."""


def to_line(record: Mapping[str, Any]) -> str:
    """Return a record as one line of JSON; floats with all their digits, so that reading gives the same number.

    JSON has no NaN and no infinity: such a value is written as null, and the line then has "non_finite": true, which
    distinguishes it from a value that is null because it is unknown (mfu without a known peak).
    """
    finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
    if any(finite[key] is None and value is not None for key, value in record.items()):
        finite["non_finite"] = True
    return json.dumps(finite, allow_nan=False) + "\n"


class MetricsFile(LinesFile):
    """A run's metrics.jsonl; the first of its sinks.

    resume_step: the step that training continues after; later lines and damaged ones are removed, and those of that
    step about another corpus than `corpus`, its checkpoint's. 0 begins a new run: files of an earlier run in the same
    folder are renamed to metrics.1.jsonl, metrics.2.jsonl, ..., never deleted.
    Raises: PathError or StorageError if the folder cannot be written.
    """

    is_part_of_run = True

    def __init__(self, path: Path, resume_step: int = 0, corpus: str | None = None) -> None:
        with writing(path):
            if resume_step:
                drop_lines_after(path, resume_step, corpus)
            else:
                _set_aside(path)
                _set_aside(path.with_name(ROLLED_BACK))
            super().__init__(path)

    def record(self, line: Mapping[str, Any]) -> None:
        """Write a line and hand it to the operating system."""
        self.append(to_line(line))

    def rewind(self, step: int) -> None:
        """Move all lines after a 1-based step to the end of metrics.rolled_back.jsonl; continue after that step.

        A crash in between leaves lines in both files; the next resume removes them from this one. Where the disk does
        not take them they stay, and the later ones of the same steps count.
        """
        self.sync()
        try:
            with self._path.open("rb") as lines, self._path.with_name(ROLLED_BACK).open("ab") as aside:
                aside.writelines(line for line in lines if (record := _record_of(line)) and record["step"] > step)
                aside.flush()
                os.fsync(aside.fileno())
            drop_lines_after(self._path, step)
        except OSError:
            return
        self.close()  # the file has been replaced: the next line opens it


def drop_lines_after(path: Path, step: int, corpus: str | None = None) -> None:
    """Remove the lines after a 1-based step, and damaged lines, from a metrics file; a missing one has none.

    corpus: the digest of what the step was trained on, if lines of this step that name another one go too.
    A crash leaves the old file or the new one.
    """
    if not path.exists():
        return

    def stays(record: dict[str, Any]) -> bool:
        is_of_corpus = corpus is None or record.get("corpus", corpus) == corpus
        return record["step"] < step or (record["step"] == step and is_of_corpus)

    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if (record := _record_of(line)) is not None and stays(record)]
    if len(kept) < len(lines):
        write_atomically(path, b"".join(kept))


@dataclass(frozen=True)
class RunMetrics:
    """The whole lines of a metrics file.

    training: the line of each step, in the file's order. evaluations: the loss by (step, path length), None where it
    was not finite. tasks: the scores on downstream tasks by step.
    """

    training: dict[int, dict[str, Any]] = field(default_factory=dict)
    evaluations: dict[tuple[int, int], float | None] = field(default_factory=dict)
    tasks: dict[int, Scores] = field(default_factory=dict)

    def last_evaluation(self, path_length: int | None, until: float = math.inf) -> tuple[int, float] | None:
        """Return (step, loss) of the newest finite evaluation up to a step; None without one.

        path_length: of the paths that were evaluated; None for any.
        """
        losses = {
            step: loss
            for (step, length), loss in self.evaluations.items()
            if path_length in (None, length) and step <= until and loss is not None
        }
        return max(losses.items(), default=None)


def read_metrics(path: Path) -> RunMetrics:
    """Read a metrics file, also that of a run in progress; a missing file has no lines.

    Raises: DataError if a line before the last one is damaged.
    """
    metrics, damaged = RunMetrics(), None
    if not path.exists():
        return metrics
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if damaged is not None:
                raise DataError(f"{path}, line {damaged} is not a JSON object with a step. Remove the line.")
            record = _record_of(line)
            if record is None:
                damaged = number
            elif "eval_loss" in record:
                metrics.evaluations[record["step"], record["path_length"]] = record["eval_loss"]
            elif "tasks" in record:
                metrics.tasks[record["step"]] = record["tasks"]
            elif "loss" in record:
                metrics.training[record["step"]] = record
    return metrics


def score_names(scores: Mapping[str, float | None]) -> list[str]:
    """Return the metrics of a task that have a number, without their standard errors."""
    return [
        name
        for name, value in scores.items()
        if value is not None and name not in NOT_SCORES and not name.endswith(STDERR)
    ]


def task_words(tasks: Scores) -> str:
    """Return the scores of tasks for people, with their standard errors."""
    parts = []
    for task, scores in tasks.items():
        errors = {name: scores.get(f"{name}{STDERR}") for name in score_names(scores)}
        numbers = [
            f"{name} {scores[name]:.4g}" + ("" if error is None else f" \u00b1 {error:.2g}")
            for name, error in errors.items()
        ]
        parts.append(f"{task} {', '.join(numbers)}")
    return "; ".join(parts)


def _record_of(line: bytes) -> dict[str, Any] | None:
    """Return the record of a whole line, None for a damaged one."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = parse_json(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _set_aside(path: Path) -> None:
    if not path.exists() or path.stat().st_size == 0:
        return
    number = 1
    while (aside := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(aside)
