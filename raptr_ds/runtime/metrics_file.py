"""metrics.jsonl: one JSON object a line, whole lines only, continued at the right step after a resume."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raptr_ds.errors import ConfigError

METRICS = "metrics.jsonl"
ROLLED_BACK = "metrics.rolled_back.jsonl"


def to_line(record: Mapping[str, Any]) -> str:
    """Return a record as one line of JSON; floats with all their digits, so that reading gives the same number.

    JSON has no NaN and no infinity: such a value is written as null, and the line then has "non_finite": true, which
    tells it from a value that is null because it is not known (mfu without a known peak).
    """
    finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
    if any(finite[key] is None and value is not None for key, value in record.items()):
        finite["non_finite"] = True
    return json.dumps(finite, allow_nan=False) + "\n"


class MetricsFile:
    """Appends records to a run's metrics.jsonl.

    resume_step: the step that training continues after; later lines, and a last line that was torn, are taken out.
    0 begins a new run: files of an earlier one in the same folder are set aside as metrics.1.jsonl, metrics.2.jsonl,
    ..., never deleted.
    Raises: ConfigError if the folder cannot be written.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if resume_step:
                drop_lines_after(path, resume_step)
            else:
                _set_aside(path)
                _set_aside(path.with_name(ROLLED_BACK))
            self._stream = path.open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise ConfigError(
                f"cannot write {path}: {error.strerror}. Set raptr_ds.train.save to a folder that you may write."
            ) from error

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record and hand it to the operating system."""
        self._stream.write(to_line(record))

    def sync(self) -> None:
        """Put all records on the disk; a checkpoint should not outlive the lines that lead to it."""
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def rewind(self, step: int) -> None:
        """Move all lines after a 1-based step to the end of metrics.rolled_back.jsonl; go on after that step.

        A crash in between leaves lines in both files; the resume that follows takes them out of this one.
        """
        self._stream.close()
        with self._path.open("rb") as lines, self._path.with_name(ROLLED_BACK).open("ab") as aside:
            aside.writelines(line for line in lines if (_step_of(line) or 0) > step)
            aside.flush()
            os.fsync(aside.fileno())
        drop_lines_after(self._path, step)
        self._stream = self._path.open("a", encoding="utf-8", buffering=1)

    def close(self) -> None:
        """Close the file; it cannot be appended to any more."""
        self._stream.close()


def drop_lines_after(path: Path, step: int) -> int:
    """Take lines after a 1-based step, and lines that are not JSON objects with a step, out of a metrics file.

    The kept lines are written aside and renamed over the file: a crash leaves the one or the other, never a part.
    Returns how many lines were dropped; a missing file has none.
    """
    if not path.exists():
        return 0
    aside, dropped = path.with_name(path.name + ".resuming"), 0
    with path.open("rb") as lines, aside.open("wb") as kept:
        for line in lines:
            line_step = _step_of(line)
            if line_step is not None and line_step <= step:
                kept.write(line)
            else:
                dropped += 1
        kept.flush()
        os.fsync(kept.fileno())
    if dropped:
        aside.replace(path)
    else:
        aside.unlink()
    return dropped


def last_evaluation(path: Path, path_length: int, step: int) -> tuple[int, float] | None:
    """Return (step, loss) of the newest finite evaluation of paths of a length, up to a step; None without one."""
    found = None
    if path.exists():
        for line in path.read_bytes().splitlines(keepends=True):
            at = _step_of(line)
            if at is not None and at <= step:
                record = json.loads(line)
                if record.get("eval_loss") is not None and record.get("path_length") == path_length:
                    found = at, float(record["eval_loss"])
    return found


def _step_of(line: bytes) -> int | None:
    """Return the step of a whole line; None for one that a crash tore (no newline, or half an object)."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record.get("step") if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _set_aside(path: Path) -> None:
    if not path.exists() or path.stat().st_size == 0:
        return
    number = 1
    while (aside := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(aside)
