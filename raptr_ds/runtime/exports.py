"""Exports: checkpoints as folders for Hugging Face transformers, made and scored beside the training, on rank 0.

A checkpoint that is due records it, and is held back from deletion until tools/export_hf.py has made exports/step-...
of it. So the disk says what is left to do: a start exports the checkpoints that record it and have no such folder, and
scores the exports whose tasks.json has no results yet. A failure of this work is an event and a line, and ends nothing.
"""

import json
import math
import shutil
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raptr_ds.atomic_file import write_atomically
from raptr_ds.checkpoint.folder import (
    checkpoints_in,
    set_aside,
    step_folder,
    step_of,
    sync_folder,
    tidy,
    unfinished_folder,
)
from raptr_ds.checkpoint.manager import Checkpoints, SaveReport
from raptr_ds.checkpoint.manifest import DamagedCheckpointError
from raptr_ds.checkpoint.read import read_manifest
from raptr_ds.config.run import RunConfig
from raptr_ds.config.sections import EvalSection, passes_multiple
from raptr_ds.errors import RaptrError
from raptr_ds.json_text import parse_json
from raptr_ds.runtime.events import EventLog
from raptr_ds.runtime.metrics import Metrics
from raptr_ds.runtime.metrics_file import METRICS, Scores, read_metrics
from raptr_ds.runtime.side_process import Ended, SideProcess
from raptr_ds.user_paths import exists, is_folder, make_folder, writing

EXPORTS = "exports"
TASKS = "tasks.json"
"""In an export that is to be scored: {"results": null}, and once it is, what tools/evaluate.py has written."""
_EXPORT = "export"  # in a checkpoint's run state, if it is due: _PLAIN or _SCORED
_PLAIN, _SCORED = "plain", "scored"
_EXPORT_SECONDS = 3600.0


@dataclass
class _Lane:
    """Work of one kind: a process at a time, in the order of the steps."""

    start: Callable[[int], SideProcess]
    ended: Callable[[int, Ended], None]
    waiting: list[int] = field(default_factory=list)
    running: tuple[int, SideProcess] | None = None

    @property
    def steps(self) -> list[int]:
        return [*([self.running[0]] if self.running else []), *self.waiting]

    def add(self, step: int) -> None:
        """Have a step wait for its turn; one under way begins again, as what it reads has been replaced."""
        if self.running is not None and self.running[0] == step:
            self.running[1].stop()
            self.running = None
        if step not in self.steps:
            insort(self.waiting, step)

    def poll(self) -> None:
        if self.running is not None:
            step, process = self.running
            if (end := process.poll()) is None:
                return
            self.running = None
            self.ended(step, end)
        if self.waiting:
            step = self.waiting.pop(0)
            try:
                self.running = step, self.start(step)
            except OSError as error:
                self.ended(step, Ended(0.0, f"it could not be started: {error}"))

    def drop_after(self, step: int) -> None:
        self.waiting = [waiting for waiting in self.waiting if waiting <= step]
        if self.running is not None and self.running[0] > step:
            self.running[1].stop()
            self.running = None


class Exports:
    """The exports of a run.

    folder: the run's; None on ranks other than 0, where its methods, which all ranks call, do nothing.
    """

    def __init__(
        self, config: RunConfig, folder: Path | None, checkpoints: Checkpoints, metrics: Metrics, events: EventLog
    ) -> None:
        self._config, self._folder, self._is_working = config, (folder or Path()) / EXPORTS, folder is not None
        self._checkpoints, self._metrics, self._events = checkpoints, metrics, events
        self._last_save = 0
        self._marks: dict[int, tuple[str, int]] = {}  # of steps not yet exported, with the last save before
        self._exporting = _Lane(self._start_export, self._export_ended)
        self._scoring = _Lane(self._start_scoring, self._scoring_ended)

    @property
    def pending(self) -> str:
        """What is left to do, in words; empty if nothing is."""
        parts = {"export": self._exporting.steps, "evaluation on tasks": self._scoring.steps}
        return " and ".join(
            f"the {what} of step{'s' * (len(steps) > 1)} {', '.join(map(str, steps))}"
            for what, steps in parts.items()
            if steps
        )

    def begin(self, step: int, is_own: bool) -> None:
        """Take up what earlier starts have left. step: where the run stands; is_own: by a checkpoint of its own.

        Raises: PathError or StorageError if the folder cannot be written.
        """
        if not self._is_working:
            return
        self._last_save = step
        with writing(self._folder):
            self._set_aside(step if is_own else -1)
            if self._config.checkpoint.export_interval:
                make_folder(self._folder)
                self._find_exports(step)
            if self._config.eval.tasks:
                self._find_scores()

    def mark(self, step: int) -> dict[str, str]:
        """Return what the checkpoint that is about to be written records about an export, and hold it if it is due."""
        if not self._is_working:
            return {}
        interval, since = self._config.checkpoint.export_interval, self._last_save
        is_end, self._last_save = step == self._config.train.steps, step
        if step in self._marks:  # the run has rolled back to it
            return {_EXPORT: self._marks[step][0]}
        if not interval or not (is_end or passes_multiple(interval, since, step)):
            return {}
        section = self._config.eval
        is_scored = section.tasks and (is_end or passes_multiple(section.task_interval or interval, since, step))
        self._hold(step, _SCORED if is_scored else _PLAIN, since)
        return {_EXPORT: self._marks[step][0]}

    def saved(self, report: SaveReport) -> None:
        """Go on with a checkpoint that was to be written: export it if it is due and there."""
        if report.step not in self._marks:
            return
        if report.error is not None:  # what fell due with it is due with the next one
            self._last_save = min(self._last_save, self._marks[report.step][1])
            if report.step not in self._exporting.steps:  # else an earlier checkpoint of this step is being exported
                self._let_go(report.step)
        else:
            self._queue(report.step)

    def poll(self) -> None:
        """See how far the work is, and begin what comes next; takes no time."""
        self._exporting.poll()
        self._scoring.poll()

    def go_back(self, step: int) -> None:
        """Abandon what is later than a step: the run has rolled back to it."""
        if not self._is_working:
            return
        self._last_save = step - 1  # its checkpoint is written once more
        for later in [marked for marked in self._marks if marked > step]:
            self._let_go(later)
        self._exporting.drop_after(step)
        self._scoring.drop_after(step)
        try:
            self._set_aside(step)
        except (OSError, RaptrError) as error:
            self._metrics.say(f"exports after step {step} stay where they are: {error}")

    def close(self) -> None:
        """End the work that is under way; the next start does it again."""
        self._exporting.drop_after(-1)
        self._scoring.drop_after(-1)

    def _find_exports(self, step: int) -> None:
        for done in tidy(self._folder):
            self._metrics.say(f"exports: {done}")
        for checkpoint in reversed(checkpoints_in(self._checkpoints.folder)):
            try:
                manifest = read_manifest(checkpoint)
            except DamagedCheckpointError:
                continue
            mark = manifest.run_state.get(_EXPORT)
            if mark is None and manifest.step == step >= self._config.train.steps:  # it had ended without
                mark = _SCORED if self._config.eval.tasks else _PLAIN
            if mark is not None:
                self._hold(manifest.step, mark, since=manifest.step - 1)
                self._queue(manifest.step)

    def _find_scores(self) -> None:
        known = read_metrics(self._folder.parent / METRICS).tasks
        for export in reversed(checkpoints_in(self._folder)):
            step = step_of(export)
            if step is None or step in known or not exists(export / TASKS):
                continue
            try:
                self._metrics.record_tasks(step, read_scores(export / TASKS))
            except ValueError:
                self._scoring.add(step)

    def _set_aside(self, after: int) -> None:
        if is_folder(self._folder) and (moved := set_aside(self._folder, after)):
            self._metrics.say(f"exports that this run does not continue from were moved to {moved}")

    def _hold(self, step: int, mark: str, since: int) -> None:
        self._marks[step] = mark, since
        self._checkpoints.held.add(step)

    def _let_go(self, step: int) -> None:
        self._marks.pop(step, None)
        self._checkpoints.release(step)

    def _queue(self, step: int) -> None:
        try:
            is_there = exists(step_folder(self._folder, step))
        except RaptrError:  # its file system is away: what the export does not find then is an event and a line
            is_there = False
        if is_there:
            self._let_go(step)
        else:
            self._exporting.add(step)

    def _start_export(self, step: int) -> SideProcess:
        unfinished = unfinished_folder(self._folder, step)
        shutil.rmtree(unfinished, ignore_errors=True)
        checkpoint, precision = step_folder(self._checkpoints.folder, step), self._config.checkpoint.export_precision
        words = ["export_hf.py", str(checkpoint), str(unfinished), "--precision", precision]
        return SideProcess(words, self._folder / "export.log", _EXPORT_SECONDS)

    def _export_ended(self, step: int, end: Ended) -> None:
        unfinished, target = unfinished_folder(self._folder, step), step_folder(self._folder, step)
        failure, is_scored = end.failure, self._marks[step][0] == _SCORED
        if failure is None:
            try:
                if is_scored:
                    write_atomically(unfinished / TASKS, json.dumps({"results": None}) + "\n")
                unfinished.rename(target)
                sync_folder(self._folder)
            except OSError as error:
                failure = str(error)
        self._let_go(step)
        if self._has_succeeded("export", step, end, failure):
            self._metrics.say(f"export of step {step}: {target}, made in {end.seconds:.1f} s beside the training")
            if is_scored:
                self._scoring.add(step)

    def _start_scoring(self, step: int) -> SideProcess:
        section, export = self._config.eval, step_folder(self._folder, step)
        (output := export / f".{TASKS}").unlink(missing_ok=True)
        how = ["--shots", str(section.task_shots), "--device", section.task_device, "--output", str(output)]
        if section.task_limit is not None:
            how += ["--limit", str(section.task_limit)]
        words, is_on_gpu = evaluation_words(section, str(export), *how), section.task_device == "cuda"
        return SideProcess(words, self._folder / "tasks.log", section.task_seconds, sees_gpus=is_on_gpu)

    def _scoring_ended(self, step: int, end: Ended) -> None:
        export, failure, scores = step_folder(self._folder, step), end.failure, {}
        if failure is None:
            try:
                scores = read_scores(export / f".{TASKS}")
                (export / f".{TASKS}").replace(export / TASKS)
            except (OSError, ValueError) as error:
                failure = f"it left no results that can be read ({error})"
        if self._has_succeeded("tasks", step, end, failure):
            self._metrics.record_tasks(step, scores)

    def _has_succeeded(self, what: str, step: int, end: Ended, failure: str | None) -> bool:
        """Record the event, and print a failure."""
        if failure is None:
            self._events.record(what, step=step, seconds=round(end.seconds, 3))
            return True
        self._events.record(f"{what}_failed", step=step, error=failure)
        which = "export" if what == "export" else "evaluation on tasks"
        self._metrics.say(
            f"{which} of step {step} failed: {failure} (all of its output is in {EXPORTS}/{what}.log of the run's "
            "folder). Training goes on; the next start tries it again, if its checkpoint or export is still there."
        )
        return False


def evaluation_words(section: EvalSection, what: str, *how: str) -> list[str]:
    """Return the words of tools/evaluate.py on a run's tasks; what: the model that they score, or --check."""
    words = ["evaluate.py", what, "--tasks", ",".join(section.tasks), *how]
    return words if section.task_files is None else [*words, "--task-files", section.task_files]


def read_scores(file: Path) -> Scores:
    """Return the results in a file of tools/evaluate.py. Raises: ValueError if it has none; OSError."""
    content: Any = parse_json(file.read_text(encoding="utf-8"))
    results = content.get("results") if isinstance(content, dict) else None
    if not isinstance(results, dict) or not results:
        raise ValueError("no results")
    return {
        task: {
            name: value if math.isfinite(value) else None
            for name, value in scores.items()
            if type(value) in (int, float)  # beside numbers the harness names the task and its filters
        }
        for task, scores in results.items()
        if isinstance(scores, dict)
    }
