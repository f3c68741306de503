"""The run's folder: a check that it can be written, and config.json."""

import json
import tempfile
from pathlib import Path
from typing import Any

from raptr_ds.atomic_file import write_atomically
from raptr_ds.errors import ConfigError


def prepare_run_folder(folder: Path, rank: int) -> None:
    """Create the folder and check that this rank can write there. Raises: ConfigError if it cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".try-", suffix=f".{rank}") as attempt:
            attempt.write(b"1")
            attempt.flush()
    except OSError as error:
        raise ConfigError(
            f"raptr_ds.train.save={str(folder)!r} cannot be written by rank {rank}: {error.strerror or error}. "
            "Set it to a folder that this user may create or write, on a disk with free space."
        ) from error


def write_config(folder: Path, resolved: dict[str, Any]) -> None:
    """Write config.json: the run file with every value in it, itself a run file."""
    write_atomically(folder / "config.json", json.dumps(resolved, indent=2) + "\n")
