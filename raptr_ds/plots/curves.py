"""Curves: a run's metrics.jsonl as columns of numbers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from raptr_ds.errors import DataError
from raptr_ds.json_text import parse_json
from raptr_ds.runtime.events import read_events
from raptr_ds.runtime.metrics_file import METRICS, STDERR, RunMetrics, read_metrics, score_names
from raptr_ds.user_paths import is_file

_COLUMNS = ("loss", "flops", "tokens", "phase", "path_length")  # of training lines, as they are


@dataclass(frozen=True)
class TaskCurve:
    """Scores of a run's exports on a task by one metric, in order of steps; arrays (n,).

    errors: standard errors, NaN where there are none.
    """

    task: str
    metric: str
    step: np.ndarray
    score: np.ndarray
    errors: np.ndarray


@dataclass(frozen=True)
class Curves:
    """A run's measurements; each training array has one entry per training line, in order of steps.

    Missing and null values are NaN. paths: the active layers, 0-based, of each path of a step (path.paths_per_step).
    """

    name: str
    model: Mapping[str, Any]
    """raptr_ds.model of the run's config.json; empty without one."""
    num_layers: int
    step: np.ndarray
    loss: np.ndarray
    flops: np.ndarray
    tokens: np.ndarray
    phase: np.ndarray
    path_length: np.ndarray
    width: np.ndarray
    """The share of each active layer that runs: 1 but where layers run in part."""
    seconds: np.ndarray
    """Spent in the run's own steps since its start, from another run's checkpoint too; a step without a line takes as
    long as the next one with a line."""
    paths: tuple[tuple[tuple[int, ...], ...], ...]
    eval_step: np.ndarray
    eval_loss: np.ndarray
    eval_path_length: np.ndarray
    tasks: tuple[TaskCurve, ...] = ()

    def full_model_evaluations(self) -> tuple[np.ndarray, np.ndarray]:
        """Return steps and losses of the evaluations of the full model, two arrays (n,)."""
        full = self.eval_path_length == self.num_layers
        return self.eval_step[full], self.eval_loss[full]

    @property
    def share_run(self) -> float:
        """The share of all layers of all steps that ran, parts of layers as such."""
        return float((self.path_length * self.width).mean() / self.num_layers)

    @property
    def ran_in_words(self) -> str:
        """That share, for a title."""
        if np.all(self.width == 1.0):
            return f"{self.share_run:.0%} of all layers of all steps ran"
        return f"{self.share_run:.0%} of the work of all layers of all steps: layers ran in part"

    def flops_at(self, steps: np.ndarray) -> np.ndarray:
        """Return the executed FLOPs after these steps, (n,); linear between lines, and from 0 at step 0."""
        return np.interp(steps, np.concatenate([[0.0], self.step]), np.concatenate([[0.0], self.flops]))

    def phase_starts(self) -> list[tuple[float, float]]:
        """Return (first step, mean path length) of each phase, in order."""
        if not self.step.size:
            return []
        firsts = np.flatnonzero(np.diff(self.phase, prepend=np.nan) != 0)
        ends = [*firsts[1:].tolist(), self.step.size]
        return [
            (float(self.step[first]), float(self.path_length[first:end].mean()))
            for first, end in zip(firsts.tolist(), ends, strict=True)
        ]

    def activity(self, max_columns: int = 1000) -> tuple[np.ndarray, np.ndarray]:
        """Return how much of each layer was active: (num_layers, columns) fractions, and the columns' edges in steps.

        With up to max_columns lines each is a column, and a fraction is the share of the step's paths that have the
        layer, times the share of it that runs. With more, a column is the mean of several lines, equally many to within
        one.
        """
        active = np.zeros((len(self.paths), self.num_layers))
        for row, paths in enumerate(self.paths):
            for path in paths:
                active[row, list(path)] += self.width[row] / len(paths)
        groups = np.array_split(np.arange(len(self.paths)), min(max_columns, len(self.paths)) or 1)
        columns = [active[group].mean(axis=0) for group in groups if group.size]
        starts = [self.step[group[0]] - 0.5 for group in groups if group.size]
        edges = np.array([*starts, self.step[-1] + 0.5]) if columns else np.zeros(1)
        return np.array(columns).T.reshape(self.num_layers, -1), edges


def load_curves(folder: Path) -> Curves:
    """Read the metrics of a run's folder.

    Raises: DataError if there is no metrics.jsonl, it is damaged before its last line, has no training line, or is of
    something else than a run.
    """
    file = folder / METRICS
    if not is_file(file):
        raise DataError(f"cannot read {file}: it does not exist. Name the folder of a run (raptr_ds.train.save).")
    metrics = read_metrics(file)
    if not metrics.training:
        raise DataError(f"{file} has no training line yet. Wait for the run's first step.")
    for step, line in metrics.training.items():
        if "path" not in line:
            raise DataError(
                f"{file}: the line of step {step} has a loss and no path, which a run's lines have. Name the folder of "
                "a run (raptr_ds.train.save)."
            )
    return curves_of(folder, metrics)


def load_all_curves(folders: Sequence[Path]) -> list[Curves]:
    """Read the metrics of several runs, each named by the last part of its folder that the others do not share.

    Raises: as load_curves.
    """
    parts = [folder.resolve().parts[::-1] for folder in folders]
    names = next((level for level in zip(*parts, strict=False) if len(set(level)) == len(folders)), None)
    curves = [load_curves(folder) for folder in folders]
    return curves if names is None else [replace(one, name=name) for one, name in zip(curves, names, strict=True)]


def incomparable(runs: Sequence[Curves]) -> str | None:
    """Return why the losses of these runs cannot be compared, as far as their config.json shows; None if they can."""
    for key, name in (("architecture", "objectives"), ("vocab_size", "vocabularies")):
        values = dict.fromkeys(str(run.model[key]) for run in runs if key in run.model)
        if len(values) > 1:
            return f"these runs have different {name} ({', '.join(values)}): their losses cannot be compared"
    return None


def curves_of(folder: Path, metrics: RunMetrics) -> Curves:
    """Return a run's metrics, with at least one training line, as curves."""
    training, evaluations = metrics.training, metrics.evaluations
    lines = [training[step] for step in sorted(training)]
    evaluated = sorted(evaluations)
    paths = tuple(tuple(map(tuple, line.get("paths", [line["path"]]))) for line in lines)
    steps = np.array([line["step"] for line in lines])
    model = _model(folder)
    deepest = max([1, *(path[-1] + 1 for of_step in paths for path in of_step if path), *(at for _, at in evaluated)])
    widths = [line.get("width") for line in lines]
    widest = max((width for width in widths if width is not None), default=1)
    num_heads = model.get("num_attention_heads", widest)
    return Curves(
        name=folder.resolve().name,
        model=model,
        num_layers=model.get("num_layers", deepest),
        step=steps,
        **{key: _column(lines, key) for key in _COLUMNS},
        width=np.array([1.0 if width is None else width / num_heads for width in widths]),
        seconds=np.cumsum(_column(lines, "step_seconds") * np.diff(steps, prepend=_begun_after(folder))),
        paths=paths,
        eval_step=np.array([step for step, _ in evaluated]),
        eval_loss=np.array([_number(evaluations[key]) for key in evaluated]),
        eval_path_length=np.array([length for _, length in evaluated]),
        tasks=tuple(_task_curves(metrics)),
    )


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean of each value and those up to window - 1 places before it, (n,); NaNs are left out."""
    known = ~np.isnan(values)
    sums = np.cumsum(np.concatenate([[0.0], np.where(known, values, 0.0)]))
    counts = np.cumsum(np.concatenate([[0], known]))
    ends = np.arange(1, values.size + 1)
    begins = np.maximum(0, ends - window)
    number = counts[ends] - counts[begins]
    return np.where(number > 0, (sums[ends] - sums[begins]) / np.maximum(number, 1), np.nan)


def _begun_after(folder: Path) -> int:
    """Return the step that a run began after: another run's if it began from its checkpoint; 0 without events.jsonl."""
    return min((event["step"] for event in read_events(folder) if event["event"] == "start"), default=0)


def _task_curves(metrics: RunMetrics) -> Iterator[TaskCurve]:
    """Yield a curve for each task and metric that has a number at some step."""
    scored = sorted(metrics.tasks.items())
    names = {(task, metric): None for _, tasks in scored for task in tasks for metric in score_names(tasks[task])}
    for task, metric in names:
        points = [(step, tasks[task]) for step, tasks in scored if tasks.get(task, {}).get(metric) is not None]
        scores = [of_task for _, of_task in points]
        steps = np.array([step for step, _ in points])
        yield TaskCurve(task, metric, steps, _column(scores, metric), _column(scores, f"{metric}{STDERR}"))


def _model(folder: Path) -> dict[str, Any]:
    """Return raptr_ds.model of the run's config.json, with its number of layers; nothing without one."""
    config = folder / "config.json"
    if is_file(config):
        try:
            model = parse_json(config.read_text(encoding="utf-8"))["raptr_ds"]["model"]
            numbers = ("num_layers", "num_attention_heads") if "num_attention_heads" in model else ("num_layers",)
            return {**model, **{key: int(model[key]) for key in numbers}}
        except (ValueError, LookupError, TypeError) as error:
            raise DataError(
                f"{config} is damaged: raptr_ds.model.num_layers cannot be read ({type(error).__name__}: {error}). "
                "Restore it, or move it away."
            ) from error
    return {}


def _column(lines: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    return np.array([_number(line.get(key)) for line in lines])


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
