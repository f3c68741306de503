"""A small copy of a comparison that its report can be made from again: the record, and each run's metrics thinned."""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from raptr_ds.atomic_file import write_atomically
from raptr_ds.errors import DataError
from raptr_ds.lab.comparison import RECORD, Comparison
from raptr_ds.lab.status import OUTCOME
from raptr_ds.runtime.metrics_file import METRICS, RunMetrics, read_metrics, to_line

_KEPT = ("path", "paths", "path_length", "width", "phase", "tokens", "flops", "lr")
_MEANS = ("loss", "step_seconds")


def keep(comparison: Comparison, folder: Path, lines: int = 64) -> Path:
    """Copy a finished comparison into a new folder of its name in `folder`; return that.

    A run keeps its config.json, every evaluation and task score, and at least so many training lines, less than twice
    as many, besides the first and the last of each phase. Such a line has the path of its own step, and the loss and
    the seconds of a step as means since the line before, so that sums and smoothed curves stay what they were. A run
    that was kept before stays as it is.
    Raises: DataError if a run is not finished, or the folder is there.
    """
    target = folder / comparison.record["name"]
    unfinished = [run for run in (*comparison.tuning, *comparison.runs) if not run.is_finished]
    if unfinished:
        raise DataError(f"{unfinished[0].folder} is {unfinished[0].state}: only finished comparisons are kept.")
    if len(comparison.runs) < comparison.num_planned:
        raise DataError(
            f"{comparison.folder / RECORD} has {len(comparison.runs)} of {comparison.num_planned} compared runs: only "
            "finished comparisons are kept. tools/experiment.py FILE --report adds what a cluster has run since."
        )
    if target.exists():
        raise DataError(f"{target} exists. Remove it to keep the comparison again.")
    runs = {run.folder: run for run in (*comparison.tuning, *comparison.runs)}  # a compared run may be a tuning run too
    for run in runs.values():
        place = target / run.folder.relative_to(comparison.folder)
        place.mkdir(parents=True)
        for name in ("config.json", OUTCOME):
            if (run.folder / name).exists():
                shutil.copyfile(run.folder / name, place / name)
        kept = [to_line(line) for line in _thinned(read_metrics(run.folder / METRICS), lines)]
        write_atomically(place / METRICS, "".join(kept))
    sessions = [{**one, "machine": _kind(one["machine"])} for one in comparison.record["sessions"]]
    write_atomically(target / RECORD, json.dumps({**comparison.record, "sessions": sessions}, indent=2) + "\n")
    return target


def _kind(machine: str) -> str:
    """Return what kind of machine a session ran on, without its name, whether or not that has been left out before."""
    return ", ".join(machine.split(", ")[-2:])


def _thinned(metrics: RunMetrics, lines: int) -> Iterator[dict[str, Any]]:
    steps = [metrics.training[step] for step in sorted(metrics.training)]
    begins = [place for place in range(len(steps)) if not place or steps[place]["phase"] != steps[place - 1]["phase"]]
    ends = {len(steps), *begins, *(place + 1 for place in begins)}  # a phase's first line and its last are kept
    length, since = max(1, (len(steps) - len(ends)) // lines), 0
    for place in range(1, len(steps) + 1):
        if place in ends or place - since == length:
            yield _mean_line(steps[since:place])
            since = place
    for (step, length), loss in sorted(metrics.evaluations.items()):
        yield {"step": step, "eval_loss": loss, "path_length": length}
    for step, scores in sorted(metrics.tasks.items()):
        yield {"step": step, "tasks": scores}


def _mean_line(window: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the last line of a window with the means of the whole; without a loss if none of them has one."""
    last, means = window[-1], {}
    for key in _MEANS:
        known = [line[key] for line in window if line.get(key) is not None]
        means[key] = sum(known) / len(known) if known else None
    return {"step": last["step"], **means, **{key: last[key] for key in _KEPT if key in last}}
