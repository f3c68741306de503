"""The record of a comparison, experiment.json in its folder: what the report needs beside the runs' metrics."""

import json
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import raptr_ds
from raptr_ds.lab.file import Experiment
from raptr_ds.lab.plan import PlannedRun, Planner
from raptr_ds.lab.runner import REPOSITORY, Progress, command_of

RECORD = "experiment.json"
_PACKAGES = ("torch", "deepspeed", "megatron-core", "numpy")


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the record of a comparison's folder, None if there is none."""
    file = folder / RECORD
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def write_record(planner: Planner, progress: Progress, name: str, session: dict[str, Any] | None) -> None:
    """Write the record; `session` (session_of) is added to those of earlier starts, None adds none."""
    experiment, folder = planner.experiment, planner.output
    earlier = (read_record(folder) or {}).get("sessions", [])
    known = [_without_time(one) for one in earlier]
    sessions = [*earlier, session] if session is not None and _without_time(session) not in known else earlier
    runs = [*progress.tuning, *progress.comparison]
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
                "path": share.path,
                "num_layers": share.num_layers,
                "steps": share.steps,
                "flops": share.flops,
                "seconds": share.seconds,
                "learning_rate": progress.rates.get(share.contestant.name),
            }
            for share in progress.shares
        ],
        "runs": [_run_record(run, folder, experiment) for run in runs],
        "sessions": sessions,
    }
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f"{RECORD}.new"
    aside.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    aside.replace(folder / RECORD)


def session_of(command: Sequence[str]) -> dict[str, Any]:
    """Return when, by which command, with which versions and on which machine a comparison is run."""
    return {
        "command": shlex.join(command),
        "started": time.strftime("%F %T %z"),
        "versions": {
            "raptr_ds": f"{raptr_ds.__version__}{_commit()}",
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "machine": f"{platform.node()}, {platform.machine()}, {os.cpu_count()} CPU threads",
    }


def _without_time(session: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in session.items() if key != "started"}


def _run_record(run: PlannedRun, folder: Path, experiment: Experiment) -> dict[str, Any]:
    return {
        "purpose": run.purpose,
        "contestant": run.contestant,
        "seed": run.seed,
        "learning_rate": run.learning_rate,
        "steps": run.steps,
        "folder": str(run.folder.relative_to(folder)),
        "command": shlex.join(command_of(run, experiment.base, experiment.processes)),
    }


def _describe_budget(experiment: Experiment) -> str:
    budget = experiment.budget
    if budget.equal == "steps":
        return "equal steps"
    what = {"flops": "equal executed FLOPs", "time": f"equal time in steps ({budget.step_time})"}[budget.equal]
    if budget.flops or budget.seconds:
        return f"{what}: {budget.flops:.4g}" if budget.flops else f"{what}: {budget.seconds:g} s"
    return f"{what}: those of {experiment.reference}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):  # no git here: the version alone has to do
        return ""
    return f" ({told.stdout.strip()})" if told.returncode == 0 else ""
