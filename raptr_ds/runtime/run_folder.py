"""The run's folder: that it can be written, and its record of the configuration."""

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

from raptr_ds.errors import ConfigError


def prepare_run_folder(folder: Path, rank: int) -> None:
    """Make the folder and try that this rank can write there. Raises: ConfigError if it cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".try-", suffix=f".{rank}") as attempt:
            attempt.write(b"1")
            attempt.flush()
    except OSError as error:
        raise ConfigError(
            f"raptr_ds.train.save={str(folder)!r} cannot be written by rank {rank}: {error.strerror or error}. "
            "Give a folder that exists or can be made, on a disk with room, with write permission for this user."
        ) from error


def write_config(folder: Path, resolved: dict[str, Any]) -> None:
    """Write config.json: the run file with every value in it, itself a run file."""
    target = folder / "config.json"
    aside = target.with_suffix(".json.new")
    with contextlib.suppress(FileNotFoundError):
        aside.unlink()
    aside.write_text(json.dumps(resolved, indent=2) + "\n", encoding="utf-8")
    aside.replace(target)
