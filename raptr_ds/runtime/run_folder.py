"""The run's folder: that it can be written, and its record of the configuration."""

import json
import tempfile
from pathlib import Path
from typing import Any

from raptr_ds.atomic_file import write_atomically
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
    write_atomically(folder / "config.json", json.dumps(resolved, indent=2) + "\n")
