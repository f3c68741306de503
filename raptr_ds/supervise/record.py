"""What a supervisor knows of a run: its folder, its newest checkpoint, and the events of its earlier starts."""

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from raptr_ds.checkpoint.folder import CHECKPOINTS, MANIFEST, checkpoints_in, step_of
from raptr_ds.config.hjson_text import read_hjson
from raptr_ds.config.overrides import apply_overrides
from raptr_ds.errors import ConfigError, RaptrError
from raptr_ds.runtime.events import EVENTS, EventLog
from raptr_ds.user_paths import is_file, make_folder


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


def complete_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, manifest) of a run's complete checkpoints, newest first; none if the folder cannot be read."""
    try:
        found = [path for path in checkpoints_in(folder / CHECKPOINTS) if is_file(path / MANIFEST)]
    except RaptrError:
        return []
    return [(step_of(path) or 0, path / MANIFEST) for path in found]


def newest_step(folder: Path | None) -> int:
    """Return the step of a run's newest complete checkpoint, 0 if there is none or the folder cannot be read."""
    found = [] if folder is None else complete_checkpoints(folder)
    return found[0][0] if found else 0


def append_event(folder: Path | None, event: str, **fields: Any) -> str | None:
    """Add to the run's events. Returns None, or why that was not possible, which ends nothing."""
    if folder is None:
        return None
    try:
        make_folder(folder)
        log = EventLog(folder)
    except RaptrError as error:
        return str(error)
    log.record(event, **fields)
    log.close()
    return None if log.failure is None else f"{folder / EVENTS} cannot be written: {log.failure}"
