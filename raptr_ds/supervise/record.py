"""What a supervisor knows of a run: its folder, its newest checkpoint, and the events of its earlier starts."""

import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any

from raptr_ds.config.hjson_text import read_hjson
from raptr_ds.config.overrides import apply_overrides
from raptr_ds.errors import ConfigError

EVENTS = "events.jsonl"

# As in raptr_ds.checkpoint.folder and .manifest, whose imports would take longer than all the rest here.
_CHECKPOINT = re.compile(r"step-(\d{8,})")
_CHECKPOINTS, _MANIFEST = "checkpoints", "manifest.json"


def run_folder(command: Sequence[str]) -> Path | None:
    """Return the folder of the run that a command starts, by its run file and settings; None if it shows none.

    command: words of a launcher's command line that end in those of pretrain.py.
    """
    file, overrides, is_setting = None, [], False
    for word, following in zip_longest(command, command[1:], fillvalue=""):
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            is_setting = name == "--set"
            if name == "--deepspeed_config":
                file = value if equals else following
            elif is_setting and equals:
                overrides.append(value)
        elif is_setting:
            overrides.append(word)
    if file is None:
        return None
    try:
        tree, _ = apply_overrides(read_hjson(Path(file))[0], overrides)
        save = tree.get("raptr_ds", {}).get("train", {}).get("save")
    except (ConfigError, AttributeError):  # the run itself reports it
        return None
    return Path(save) if isinstance(save, str) and save else Path("runs", Path(file).stem)  # config/derive.py


def newest_step(folder: Path | None) -> int:
    """Return the step of a run's newest complete checkpoint, 0 if there is none or the folder cannot be read."""
    try:
        found = [] if folder is None else list((folder / _CHECKPOINTS).iterdir())
        matches = [(path, match) for path in found if (match := _CHECKPOINT.fullmatch(path.name))]
        return max((int(match[1]) for path, match in matches if (path / _MANIFEST).is_file()), default=0)
    except (OSError, ValueError):
        return 0


def append_event(folder: Path | None, event: str, **fields: Any) -> str | None:
    """Add one line to the run's events. Returns None, or why it could not be written, which ends nothing."""
    if folder is None:
        return None
    line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **fields}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / EVENTS).open("ab+") as file:
            is_torn = file.seek(0, 2) > 0 and (file.seek(-1, 2), file.read())[1] != b"\n"
            file.write(b"\n" * is_torn + json.dumps(line).encode() + b"\n")
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        why = error.strerror if isinstance(error, OSError) else error
        return f"{folder / EVENTS} cannot be written: {why}"
    return None


def read_events(folder: Path | None) -> list[dict[str, Any]]:
    """Return the run's events, oldest first; lines that a full disk or a crash cut short are left out."""
    try:
        lines = [] if folder is None else (folder / EVENTS).read_bytes().splitlines()
    except (OSError, ValueError):
        return []
    events = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            events.append(event)
    return events
