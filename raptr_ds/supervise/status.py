"""How a run stands, read from its folder alone, while it trains or after: nothing of it is loaded or changed."""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

from raptr_ds.errors import DataError, Exit
from raptr_ds.json_text import parse_json
from raptr_ds.runtime.events import EVENTS, read_events
from raptr_ds.runtime.metrics_file import METRICS, Scores, read_metrics, task_words
from raptr_ds.runtime.run_lock import LOCK, holder_in
from raptr_ds.supervise.record import complete_checkpoints
from raptr_ds.user_paths import is_file, is_folder

ALIVE_SECONDS = 60.0
"""A running run renews its lock every ten seconds."""
_RECENT_STEPS = 100
_STATES_AFTER = {
    "submit": "queued",
    "start": "failed",  # its process is gone, and wrote no end
    "end": "failed",
    "hang": "failed",
    "launch": "starting",
    "restart": "starting",
    "stopped": "stopped",
    "give_up": "failed",
    "done": "finished",
}
_SLOWEST = ("slowest_rank", "slowest_rank_seconds", "median_rank_seconds")
_BARS = "▁▂▃▄▅▆▇█"
_COLUMNS = 60


@dataclass(frozen=True)
class RunStatus:
    """How a run stands; None where nothing is known.

    state: running, silent (its lock is there, and is not renewed), queued (submitted, and not started since), starting
    (its supervisor tries it again), finished, stopped, failed or new. holder: the process that works in the folder.
    step: of the last training line. losses: of all training lines. tokens_per_second, mfu, step_seconds: medians of the
    last 100 steps. seconds_left: at that speed, without evaluations. flops_saved: share of the full model's FLOPs not
    executed, up to the last checkpoint. checkpoint_age: in seconds. failed_saves: since the last start. slowest_rank:
    (rank, its seconds of own work in a step, the median of the ranks it is compared with). tasks: the newest export
    that was scored, its step and scores. starts: since the run began.
    """

    folder: str
    state: str
    holder: str | None
    silent_seconds: float | None
    step: int
    num_steps: int | None
    phase: int | None
    path_length: float | None
    num_layers: int | None
    losses: list[float | None] = field(repr=False)
    evaluation: tuple[int, float] | None
    tasks: tuple[int, Scores] | None
    tokens_per_second: float | None
    step_seconds: float | None
    mfu: float | None
    seconds_left: float | None
    flops_saved: float | None
    skipped_steps: int
    checkpoint_step: int | None
    checkpoint_age: float | None
    failed_saves: int
    slowest_rank: tuple[int, float, float] | None
    starts: int
    events: list[dict[str, Any]] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, the losses left out: metrics.jsonl has them."""
        values = asdict(self)
        values.pop("losses")
        return values


def status_of(folder: Path, now: float | None = None) -> RunStatus:
    """Read a run's folder. now: seconds since 1970, for ages.

    Raises: DataError if it is not a run's folder, or a file in it is damaged before its last line; PathError.
    """
    now = time.time() if now is None else now
    config = _read_config(folder)
    metrics, events = read_metrics(folder / METRICS), read_events(folder)
    lines = [metrics.training[step] for step in sorted(metrics.training)]
    recent, last = lines[-_RECENT_STEPS:], lines[-1] if lines else {}
    block = config.get("raptr_ds", {})
    num_steps, num_layers = block.get("train", {}).get("steps"), block.get("model", {}).get("num_layers")
    step, step_seconds = last.get("step", 0), _median(line["step_seconds"] for line in recent)
    checkpoint, checkpoint_age, saved = _newest_checkpoint(folder, now)
    holder, silent = holder_of(folder, now)
    starts = [event for event in events if event.get("event") == "start"]
    since_start = events[events.index(starts[-1]) :] if starts else []
    return RunStatus(
        folder=str(folder),
        state=_state(silent, step == num_steps, events),
        holder=holder,
        silent_seconds=silent,
        step=step,
        num_steps=num_steps,
        phase=last.get("phase"),
        path_length=last.get("path_length"),
        num_layers=num_layers,
        losses=[line["loss"] for line in lines],
        evaluation=metrics.last_evaluation(num_layers),
        tasks=max(metrics.tasks.items(), key=lambda item: item[0], default=None),
        tokens_per_second=_median(line.get("tokens_per_second") for line in recent),
        step_seconds=step_seconds,
        mfu=_median(line.get("mfu") for line in recent),
        seconds_left=None if step_seconds is None or num_steps is None else step_seconds * (num_steps - step),
        flops_saved=saved,
        skipped_steps=last.get("skipped_steps", 0),
        checkpoint_step=checkpoint,
        checkpoint_age=checkpoint_age,
        failed_saves=sum(event.get("event") == "checkpoint_failed" for event in since_start),
        slowest_rank=tuple(last[key] for key in _SLOWEST) if _SLOWEST[0] in last else None,  # type: ignore[arg-type]
        starts=_num_starts(starts),
        events=events,
    )


def describe(status: RunStatus, num_events: int = 8) -> list[str]:
    """Return the status for people, a line each, with the last events."""
    of = "" if status.num_steps is None else f" of {status.num_steps:,} ({status.step / status.num_steps:.1%})"
    path = "" if status.phase is None else f", phase {status.phase}, path {status.path_length:.3g}/{status.num_layers}"
    times = "once" if status.starts == 1 else f"{status.starts} times"
    holder = ""
    if status.silent_seconds is not None:
        holder = f" ({status.holder}; last sign of life {duration(status.silent_seconds)} ago)"
    lines = [
        f"{status.folder}: {status.state}{holder}",
        f"step         {status.step:,}{of}{path}; started {times}",
    ]
    known = [loss for loss in status.losses if loss is not None]
    if known:
        lines.append(f"loss         {sparkline(known)}  {known[0]:.4g} to {fmean(known[-_RECENT_STEPS:]):.4g}")
    if status.evaluation is not None:
        lines.append(f"held-out     {status.evaluation[1]:.4f} after step {status.evaluation[0]:,}")
    if status.tasks is not None:
        lines.append(f"tasks        {task_words(status.tasks[1])} after step {status.tasks[0]:,}")
    if status.step_seconds is not None and status.tokens_per_second is not None:
        mfu = "" if status.mfu is None else f", {status.mfu:.1%} of the peak"
        lines.append(f"speed        {status.tokens_per_second:,.0f} tokens/s, {status.step_seconds:.3g} s a step{mfu}")
    if status.slowest_rank is not None:
        rank, seconds, usual = status.slowest_rank
        lines.append(f"slowest      rank {rank}: {seconds:.3g} s of own work in a step, the median is {usual:.3g} s")
    if status.flops_saved is not None:
        lines.append(f"saved        {status.flops_saved:.1%} of the full model's FLOPs up to the last checkpoint")
    failed = f"; {status.failed_saves} could NOT be written since the last start" if status.failed_saves else ""
    if status.checkpoint_step is not None and status.checkpoint_age is not None:
        lines.append(f"checkpoint   step {status.checkpoint_step:,}, {duration(status.checkpoint_age)} old{failed}")
    elif failed:
        lines.append(f"checkpoint   none{failed}")
    if status.skipped_steps:
        lines.append(f"skipped      {status.skipped_steps} steps that were not finite")
    if status.seconds_left and status.state in {"running", "silent"}:
        lines.append(f"left         {duration(status.seconds_left)} at this speed (longer paths are slower)")
    shown = [event for event in status.events if event.get("event") != "checkpoint"]
    shown = shown[max(0, len(shown) - num_events) :]
    return [*lines, *(f"  {_event_words(event)}" for event in shown)]


def sparkline(values: Sequence[float], columns: int = _COLUMNS) -> str:
    """Return a curve of block characters, each the mean of as many values."""
    columns = min(columns, len(values))
    bounds = [len(values) * column // columns for column in range(columns + 1)]
    means = [fmean(values[begin:end]) for begin, end in pairwise(bounds)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


def duration(seconds: float) -> str:
    """Return a time as 45 s, 12 min, 3 h 20 min or 2 d 4 h."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _num_starts(starts: Sequence[dict[str, Any]]) -> int:
    """Return how often the folder's last run was started; earlier ones ended where a user began another at step 0."""
    begins = [
        index for index, start in enumerate(starts) if start.get("step") == 0 and not start.get("restart_count", 0)
    ]
    return len(starts) - (begins[-1] if begins else 0)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not is_file(path) and is_file(folder / EVENTS):  # submitted, or ended before its first start
        return {}
    if not is_folder(folder) or not is_file(path):
        raise DataError(
            f"{folder} is not a run's folder: it has neither config.json nor {EVENTS}. Give raptr_ds.train.save of a "
            "run."
        )
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}). Restore it: a start of the run writes it anew.") from error
    return content if isinstance(content, dict) else {}


def _newest_checkpoint(folder: Path, now: float) -> tuple[int | None, float | None, float | None]:
    """Return (step, age in seconds, share of FLOPs saved) of the newest checkpoint whose manifest can be read."""
    for step, manifest in complete_checkpoints(folder):
        try:
            state = parse_json(manifest.read_bytes())["run_state"]
            age = now - manifest.stat().st_mtime
            saved = 1 - state["flops"] / state["full_flops"] if state.get("full_flops") else None
        except (OSError, ValueError, LookupError, TypeError):
            continue
        return step, age, saved
    return None, None, None


def holder_of(folder: Path, now: float) -> tuple[str | None, float | None]:
    """Return who works in a run's folder, and the seconds since its last sign of life."""
    holder = holder_in(folder)
    try:
        silent = now - (folder / LOCK).stat().st_mtime
    except (OSError, ValueError):
        return None, None
    return (None, None) if holder is None else (str(holder), max(0.0, silent))


def _state(silent: float | None, is_trained: bool, events: list[dict[str, Any]]) -> str:
    if silent is not None:
        return "running" if silent < ALIVE_SECONDS else "silent"
    decisive = [event for event in events if event.get("event") in _STATES_AFTER]
    if not decisive:  # no events: it has not begun, or is of a version without them
        return "finished" if is_trained else "new"
    last = decisive[-1]
    if last["event"] == "end" and last.get("exit_code") in (Exit.DONE, Exit.CONTINUE_LATER):
        return "finished" if last["exit_code"] == Exit.DONE else "stopped"
    return _STATES_AFTER[last["event"]]


def _event_words(event: dict[str, Any]) -> str:
    """Return an event in one line: its time here, its name and what belongs to it."""
    try:
        at = datetime.fromisoformat(str(event.get("time"))).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except ValueError:
        at = str(event.get("time"))
    rest = {key: value for key, value in event.items() if key not in {"time", "event"} and value not in (None, {}, [])}
    words = ", ".join(f"{key} {value if isinstance(value, str) else json.dumps(value)}" for key, value in rest.items())
    return f"{at}  {event.get('event')}: {words if len(words) <= 160 else words[:157] + '...'}"


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
