"""A comparison's folder as values: each run's curves and end, by contestant and seed."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raptr_ds.errors import DataError
from raptr_ds.plots.curves import Curves, curves_of
from raptr_ds.runtime.metrics_file import METRICS, read_metrics

RECORD, OUTCOME, LOG = "experiment.json", "outcome.json", "log.txt"
_LOG_LINES = 15


@dataclass(frozen=True)
class RunResult:
    """One run. curves: None before its first step; final_loss: held-out, of the full model, None before the end.

    wall_seconds: of the whole process, over all its starts; None where a cluster ran it.
    """

    contestant: str
    seed: int
    learning_rate: float | None
    num_steps: int
    folder: Path
    command: str
    curves: Curves | None
    final_loss: float | None
    exit_code: int | None
    wall_seconds: float | None

    @property
    def is_finished(self) -> bool:
        """Whether it is at its last step and evaluated there."""
        return self.final_loss is not None

    @property
    def flops(self) -> float:
        """Executed FLOPs of training so far."""
        return float(self.curves.flops[-1]) if self.curves is not None else 0.0

    @property
    def step_seconds(self) -> float:
        """Seconds spent in steps so far: no start, evaluation or checkpoint."""
        return float(self.curves.seconds[-1]) if self.curves is not None else 0.0

    @property
    def state(self) -> str:
        """How it stands, for people."""
        if self.is_finished:
            return "finished"
        at = (
            f"at step {self.curves.step[-1]} of {self.num_steps}"
            if self.curves is not None
            else "before its first step"
        )
        return f"failed {at}, exit code {self.exit_code}" if self.exit_code else f"unfinished, {at}"

    def last_log_lines(self) -> list[str]:
        """Return the end of the run's log, empty where a cluster keeps it."""
        log = self.folder / LOG
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        return [line.rstrip() for line in text.splitlines() if line.strip()][-_LOG_LINES:]


@dataclass(frozen=True)
class Comparison:
    """All of a comparison. record: experiment.json; runs: those compared; tuning: those that chose learning rates."""

    folder: Path
    record: dict[str, Any]
    runs: tuple[RunResult, ...]
    tuning: tuple[RunResult, ...]

    @property
    def contestants(self) -> list[str]:
        """Names in the file's order."""
        return [one["name"] for one in self.record["contestants"]]

    def about(self, name: str) -> dict[str, Any]:
        """Return what the record says of a contestant."""
        return next(one for one in self.record["contestants"] if one["name"] == name)

    def of(self, name: str) -> list[RunResult]:
        """Return a contestant's compared runs, in the order of the seeds."""
        return [run for run in self.runs if run.contestant == name]

    def final_losses(self, name: str) -> dict[int, float]:
        """Return the held-out losses of a contestant's finished runs by seed; a loss that is not finite is left out."""
        runs = self.of(name)
        return {
            run.seed: run.final_loss for run in runs if run.final_loss is not None and math.isfinite(run.final_loss)
        }


def load_comparison(folder: Path) -> Comparison:
    """Read a comparison's folder, finished or not. Raises: DataError if it is none, or a run's metrics are damaged."""
    file = folder / RECORD
    if not file.exists():
        raise DataError(
            f"{folder} has no {RECORD}: no comparison was run there. python tools/experiment.py FILE runs one."
        )
    record = json.loads(file.read_text(encoding="utf-8"))
    results = [(run["purpose"], _result_of(folder, run)) for run in record["runs"]]
    compared = sorted(
        (run for purpose, run in results if purpose == "comparison"),
        key=lambda run: record["seeds"].index(run.seed),
    )
    return Comparison(folder, record, tuple(compared), tuple(run for purpose, run in results if purpose == "tuning"))


def mean_curve(runs: list[RunResult], by: str, evaluated: bool) -> tuple[np.ndarray, np.ndarray] | None:
    """Return a contestant's loss curves over its seeds on one x axis: x (n,) and losses (seeds, n).

    by: step, flops or seconds. evaluated: the full model's held-out loss, else the training loss. x is the mean over
    the seeds at each step that all of them have; None if there is none.
    """
    points = [_points(run.curves, by, evaluated) for run in runs if run.curves is not None]
    if not points:
        return None
    steps = sorted(set.intersection(*(set(one) for one in points)))
    if not steps:
        return None
    x = np.array([[one[step][0] for step in steps] for one in points]).mean(axis=0)
    return x, np.array([[one[step][1] for step in steps] for one in points])


def phase_losses(run: RunResult) -> list[tuple[float, float, float | None]]:
    """Return (first step, mean path length, full model's last held-out loss in it) of each phase of a run."""
    curves = run.curves
    if curves is None:
        return []
    starts = curves.phase_starts()
    steps, losses = curves.full_model_evaluations()
    rows = []
    for number, (first, length) in enumerate(starts):
        end = starts[number + 1][0] if number + 1 < len(starts) else math.inf
        inside = losses[(steps >= first) & (steps < end)]
        rows.append((first, length, float(inside[-1]) if inside.size else None))
    return rows


def _points(curves: Curves, by: str, evaluated: bool) -> dict[int, tuple[float, float]]:
    """Return step -> (x, loss)."""
    along = {"step": curves.step.astype(float), "flops": curves.flops, "seconds": curves.seconds}[by]
    steps, losses = curves.full_model_evaluations() if evaluated else (curves.step, curves.loss)
    places = np.interp(steps, curves.step, along)
    return {int(step): (float(x), float(y)) for step, x, y in zip(steps, places, losses, strict=True)}


def _result_of(folder: Path, run: dict[str, Any]) -> RunResult:
    place = folder / run["folder"]
    metrics = read_metrics(place / METRICS)
    curves = curves_of(place, metrics) if metrics.training else None
    final_loss = None
    if curves is not None and curves.step[-1] >= run["steps"]:
        steps, losses = curves.full_model_evaluations()
        final_loss = float(losses[-1]) if steps.size and steps[-1] == run["steps"] else None
    outcome = json.loads((place / OUTCOME).read_text(encoding="utf-8")) if (place / OUTCOME).exists() else {}
    return RunResult(
        contestant=run["contestant"],
        seed=run["seed"],
        learning_rate=run["learning_rate"],
        num_steps=run["steps"],
        folder=place,
        command=run["command"],
        curves=curves,
        final_loss=final_loss,
        exit_code=outcome.get("exit_code"),
        wall_seconds=outcome.get("wall_seconds"),
    )
