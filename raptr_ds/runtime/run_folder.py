"""The run's folder: that it can be written, and what a new run finds in an old one."""

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

from raptr_ds.errors import ConfigError


def prepare_run_folder(folder: Path, rank: int, load: str) -> None:
    """Make the folder and try that this rank can write there; a run that starts afresh sets old checkpoints aside.

    load: the run file's checkpoint.load. Raises: ConfigError if the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".try-", suffix=f".{rank}") as attempt:
            attempt.write(b"1")
            attempt.flush()
        if rank == 0 and load == "none":
            _set_aside(folder / "checkpoints")
    except OSError as error:
        raise ConfigError(
            f"raptr_ds.train.save={str(folder)!r} cannot be written by rank {rank}: {error.strerror or error}. "
            "Give a folder that exists or can be made, on a disk with room, with write permission for this user."
        ) from error


def _set_aside(folder: Path) -> None:
    if not folder.exists():
        return
    number = 1
    while (target := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(target)


def write_config(folder: Path, resolved: dict[str, Any]) -> None:
    """Write config.json: the run file with every value in it, itself a run file."""
    target = folder / "config.json"
    aside = target.with_suffix(".json.new")
    with contextlib.suppress(FileNotFoundError):
        aside.unlink()
    aside.write_text(json.dumps(resolved, indent=2) + "\n", encoding="utf-8")
    aside.replace(target)
