"""A comparison's folder: its record, experiment.json, and the record together with the runs' curves as values."""

import json
import math
import os
import platform
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import raptr_ds
from raptr_ds.atomic_file import write_atomically
from raptr_ds.errors import DataError
from raptr_ds.json_text import parse_json
from raptr_ds.lab.file import Experiment
from raptr_ds.lab.plan import Planner
from raptr_ds.lab.runner import ComparisonProgress, command_of
from raptr_ds.lab.status import Outcome, outcome_of
from raptr_ds.plots.curves import Curves, curves_of
from raptr_ds.runtime.events import code_revision
from raptr_ds.runtime.metrics_file import METRICS, read_metrics
from raptr_ds.user_paths import is_file

RECORD = "experiment.json"
_KEYS = ("name", "base", "settings", "processes", "seeds", "budget", "sweep", "contestants", "runs", "sessions")
_KEYS_OF_CONTESTANT = ("name", "settings", "path", "steps", "flops", "learning_rate")
_KEYS_OF_RUN = ("purpose", "contestant", "seed", "learning_rate", "steps", "folder", "command")
_PACKAGES = ("torch", "deepspeed", "megatron-core", "numpy")


@dataclass(frozen=True)
class RunResult:
    """One run. curves: None before its first step; final_loss: held-out, of the full model, None before the end.

    outcome: of its process, over all its starts; empty where a cluster ran it.
    """

    contestant: str
    seed: int
    learning_rate: float | None
    steps: int
    folder: Path
    command: str
    curves: Curves | None
    final_loss: float | None
    outcome: Outcome

    @property
    def is_finished(self) -> bool:
        """Whether it has reached its last step and was evaluated there."""
        return self.final_loss is not None

    @property
    def has_failed(self) -> bool:
        """Whether its last start has ended before that by a failure, not by a request to stop."""
        return not self.is_finished and self.outcome.has_failed

    @property
    def flops(self) -> float:
        """Executed FLOPs of training so far."""
        return float(self.curves.flops[-1]) if self.curves is not None else 0.0

    @property
    def step_seconds(self) -> float:
        """Seconds spent in steps so far, without start-up, evaluations and checkpoints."""
        return float(self.curves.seconds[-1]) if self.curves is not None else 0.0

    @property
    def state(self) -> str:
        """How far it is, in words."""
        if self.is_finished:
            return "finished"
        at = "before its first step" if self.curves is None else f"at step {self.curves.step[-1]} of {self.steps}"
        return f"failed {at}, exit code {self.outcome.exit_code}" if self.has_failed else f"unfinished, {at}"

    def phase_losses(self) -> list[tuple[float, float, float | None]]:
        """Return (first step, mean path length, full model's last held-out loss) of each phase."""
        if self.curves is None:
            return []
        starts = self.curves.phase_starts()
        ends = [*(first for first, _ in starts[1:]), math.inf]
        steps, losses = self.curves.full_model_evaluations()
        rows = []
        for (first, length), end in zip(starts, ends, strict=True):
            inside = losses[(steps >= first) & (steps < end)]
            rows.append((first, length, float(inside[-1]) if inside.size else None))
        return rows


@dataclass(frozen=True)
class Comparison:
    """A whole comparison. record: experiment.json; runs: those compared; tuning: those that chose learning rates."""

    folder: Path
    record: dict[str, Any]
    runs: tuple[RunResult, ...]
    tuning: tuple[RunResult, ...]

    @property
    def contestants(self) -> list[str]:
        """Names in the file's order."""
        return [one["name"] for one in self.record["contestants"]]

    @property
    def num_planned(self) -> int:
        """How many runs are to be compared; those whose learning rates are not chosen yet are not among `runs`."""
        seeds = self.record["seeds"]
        return sum(len(one.get("seeds", seeds)) for one in self.record["contestants"])  # older: all seeds for all

    def about(self, name: str) -> dict[str, Any]:
        """Return a contestant's entry in the record."""
        return next(one for one in self.record["contestants"] if one["name"] == name)

    def of(self, name: str) -> list[RunResult]:
        """Return a contestant's compared runs, in the order of the seeds."""
        return [run for run in self.runs if run.contestant == name]

    def final_losses(self, name: str) -> dict[int, float]:
        """Return the finite held-out losses of a contestant's finished runs by seed."""
        losses = {run.seed: run.final_loss for run in self.of(name)}
        return {seed: loss for seed, loss in losses.items() if loss is not None and math.isfinite(loss)}


def load_comparison(folder: Path) -> Comparison:
    """Read a comparison's folder, finished or not.

    Raises: DataError if it holds no comparison, or one whose runs are not planned yet, or a run's files are damaged.
    """
    record = read_record(folder)
    if record is None:
        raise DataError(
            f"{folder} has no {RECORD}: no comparison has run there. python tools/experiment.py FILE runs one."
        )
    if not record["contestants"]:  # lab/slurm.py
        raise DataError(
            f"{folder} has nothing to report: the step times that decide its runs are not measured yet. When the jobs "
            "that measure them have ended, submit the comparison again."
        )
    results = {"tuning": [], "comparison": []}
    for run in record["runs"]:
        results[run["purpose"]].append(_result_of(folder, run))
    compared = sorted(results["comparison"], key=lambda run: record["seeds"].index(run.seed))
    return Comparison(folder, record, tuple(compared), tuple(results["tuning"]))


def mean_curve(runs: list[RunResult], by: str, evaluated: bool) -> tuple[np.ndarray, np.ndarray] | None:
    """Return a contestant's loss curves over its seeds on one x axis: x (n,) and losses (seeds, n).

    by: step, flops or seconds. evaluated: the full model's held-out loss, else the training loss. x is the mean over
    the seeds at each step that all of them have; None if there is none.
    """
    points = [_points(run.curves, by, evaluated) for run in runs if run.curves is not None]
    steps = sorted(set.intersection(*map(set, points))) if points else []
    if not steps:
        return None
    table = np.array([[one[step] for step in steps] for one in points])
    return table[..., 0].mean(axis=0), table[..., 1]


def _points(curves: Curves, by: str, evaluated: bool) -> dict[int, tuple[float, float]]:
    """Return step -> (x, loss)."""
    along = {"step": curves.step.astype(float), "flops": curves.flops, "seconds": curves.seconds}[by]
    steps, losses = curves.full_model_evaluations() if evaluated else (curves.step, curves.loss)
    places = np.interp(steps, curves.step, along)
    return {int(step): (float(x), float(y)) for step, x, y in zip(steps, places, losses, strict=True)}


def _result_of(folder: Path, run: dict[str, Any]) -> RunResult:
    place = folder / run["folder"]
    metrics, outcome = read_metrics(place / METRICS), outcome_of(place)
    curves = curves_of(place, metrics) if metrics.training else None
    final_loss = None
    if curves is not None and curves.step[-1] >= run["steps"]:
        steps, losses = curves.full_model_evaluations()
        final_loss = float(losses[-1]) if steps.size and steps[-1] == run["steps"] else None
    return RunResult(
        **{key: run[key] for key in _KEYS_OF_RUN if key not in ("purpose", "folder")},
        folder=place,
        curves=curves,
        final_loss=final_loss,
        outcome=outcome,
    )


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the record of a comparison's folder, None if there is none. Raises: DataError if it is damaged."""
    file = folder / RECORD
    if not is_file(file):
        return None
    try:
        record = parse_json(file.read_text(encoding="utf-8"))
        contestants = ((one, _KEYS_OF_CONTESTANT) for one in record["contestants"])
        for node, keys in [(record, _KEYS), *contestants, *((run, _KEYS_OF_RUN) for run in record["runs"])]:
            if missing := [key for key in keys if key not in node]:
                raise KeyError(", ".join(missing))
        return record
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{file} is damaged ({type(error).__name__}: {error}). Remove it and start the comparison again, which "
            "runs only what is missing, or restore it from a copy."
        ) from error


def write_record(planner: Planner, progress: ComparisonProgress, name: str, session: dict[str, Any] | None) -> None:
    """Write the record: what the report needs beside the runs' metrics.

    session: the current start (session_of), added to the earlier ones unless only its time is new; None adds nothing.
    """
    experiment, folder = planner.experiment, planner.output
    sessions = (read_record(folder) or {}).get("sessions", [])
    if session is not None and not any({**session, "started": one["started"]} == one for one in sessions):
        sessions = [*sessions, session]
    record = {
        "name": name,
        "base": experiment.base,
        "settings": list(experiment.set),
        "processes": experiment.processes,
        "seeds": list(experiment.seeds),
        "budget": _describe_budget(experiment),
        "sweep": None if experiment.sweep is None else experiment.sweep.model_dump(mode="json"),
        "contestants": [
            {
                "name": share.contestant.name,
                "settings": list(share.contestant.settings),
                "seeds": experiment.seeds_of(share.contestant),
                "path": share.path,
                "num_layers": share.num_layers,
                "steps": share.steps,
                "flops": share.flops,
                "seconds": share.seconds,
                "learning_rate": progress.rates.get(share.contestant.name),
            }
            for share in progress.shares
        ],
        "runs": [
            {
                "purpose": run.purpose,
                "contestant": run.contestant,
                "seed": run.seed,
                "learning_rate": run.learning_rate,
                "steps": run.steps,
                "folder": str(run.folder.relative_to(folder)),
                "command": shlex.join(command_of(run, experiment.base, experiment.processes)),
            }
            for run in (*progress.tuning, *progress.comparison)
        ],
        "sessions": sessions,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / RECORD, json.dumps(record, indent=2) + "\n")


def session_of(command: Sequence[str]) -> dict[str, Any]:
    """Return when, by which command, with which versions and on which machine a comparison is run."""
    return {
        "command": shlex.join(command),
        "started": time.strftime("%F %T %z"),
        "versions": {
            "raptr_ds": raptr_ds.__version__ + (f" ({revision})" if (revision := code_revision()) else ""),
            "python": platform.python_version(),
            **{name: version(name) for name in _PACKAGES},
        },
        "machine": f"{platform.node()}, {platform.machine()}, {os.cpu_count()} CPU threads",
    }


def _describe_budget(experiment: Experiment) -> str:
    budget = experiment.budget
    if budget.equal == "steps":
        return "equal steps"
    what = {"flops": "equal executed FLOPs", "time": f"equal time in steps ({budget.step_time})"}[budget.equal]
    if budget.flops or budget.seconds:
        return f"{what}: {budget.flops:.4g}" if budget.flops else f"{what}: {budget.seconds:g} s"
    return f"{what}: those of {experiment.reference}"
