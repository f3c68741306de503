"""events.jsonl: what happened to a run besides its steps, for whoever looks after it. One JSON object a line.

Each has `time` (UTC, ISO 8601), `event`, and what belongs to the event:
start: step, launcher, hosts, world_size, layout, restart_count, slurm_job, version, revision, seconds: of rank 0, by
part of the start;
changed: step, keys, corpus: how the run differs from the checkpoint that it continues from;
checkpoint: step, bytes, seconds; checkpoint_failed: step, error; rolled_back: step, to_step;
export: step, seconds; export_failed: step, error; tasks (an export was scored): step, seconds; tasks_failed: step,
error;
slow_rank: step, rank, host, seconds, median: a rank took over 1.5 times the median in the last 20 steps;
stop: reason; hang: ranks, missing: where each rank stood, and those that did not answer; end: exit_code;
signal_lead: lead, needed, write: the seconds between the signal to stop and the time limit, those that steps, an
evaluation's batch and saves were measured to take, and those to ask for.
tools/submit.py adds submit; tools/supervise.py, under Slurm too, adds launch, restart, give_up and done,
elsewhere also stopped (docs/slurm.md).
Unlike metrics.jsonl it is never rewritten: a restart adds to it.
"""

import datetime
import json
import subprocess
from pathlib import Path
from typing import Any

from raptr_ds.json_text import parse_json
from raptr_ds.runtime.lines_file import LinesFile
from raptr_ds.user_paths import writing

EVENTS = "events.jsonl"
REVISION_FILE = "revision.txt"
"""In the copy of the code that tools/submit.py makes: the revision that it was made of."""
_SOURCES = Path(__file__).resolve().parents[2]


class EventLog:
    """Appends events of a run; on ranks other than 0 (`folder` None) it does nothing.

    Raises: PathError or StorageError if the file cannot be opened.
    """

    def __init__(self, folder: Path | None) -> None:
        self._lines = None
        if folder is not None:
            with writing(folder / EVENTS):
                self._lines = LinesFile(folder / EVENTS)

    def record(self, event: str, **what: Any) -> None:
        """Append an event; what the disk does not take now is written with a later one."""
        if self._lines is not None:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
            self._lines.append(json.dumps({"time": now, "event": event, **what}) + "\n")

    @property
    def failure(self) -> str | None:
        """Why events wait in memory, None while none do."""
        return None if self._lines is None else self._lines.failure

    def close(self) -> None:
        """Close the file."""
        if self._lines is not None:
            self._lines.close()


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Return a run's events, oldest first; lines that a full disk or a crash cut short are left out."""
    try:
        lines = (folder / EVENTS).read_bytes().splitlines()
    except (OSError, ValueError):  # ValueError: a NUL byte in the path
        return []
    events = []
    for line in lines:
        try:
            event = parse_json(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            events.append(event)
    return events


def code_revision() -> str | None:
    """Return git's description of the code that runs, with "-dirty" where it was edited; None outside a clone."""
    if (_SOURCES / REVISION_FILE).is_file():
        return (_SOURCES / REVISION_FILE).read_text(encoding="utf-8").strip()
    words = ["git", "-C", str(_SOURCES), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
