"""Where unfinished work lies: locked against a second process, journalled so that an interruption loses little."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from raptr_ds.errors import DataError, RaptrError

WORK = ".prepare"
LOCK = ".lock"
JOURNAL = "journal.json"


@dataclass
class Done:
    """What is finished: documents, bytes of text, seconds spent, and the sizes in bytes of the files that hold it."""

    documents: int = 0
    text_bytes: int = 0
    seconds: float = 0.0
    sizes: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    splits: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass
class WorkingFolder:
    """The folder, and how far the preparation of this fingerprint has come."""

    path: Path
    fingerprint: str
    done: Done = field(default_factory=Done)

    def write_journal(self) -> None:
        """Put on disk how far the work has come; what lies behind it must be on disk already."""
        aside = self.path / (JOURNAL + ".new")
        with aside.open("w") as stream:
            json.dump({"fingerprint": self.fingerprint, "done": asdict(self.done)}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(self.path / JOURNAL)


@contextmanager
def working_folder(output: Path, fingerprint: str) -> Iterator[WorkingFolder]:
    """Give the working folder in `output`, emptied unless it belongs to this very preparation; removed at the end.

    An interruption leaves it for the same command to go on; a user's error before anything was encoded does not.
    Raises: DataError if it cannot be written or another process is at it.
    """
    path = output / WORK
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (output / LOCK).open("w")
    except OSError as error:
        raise DataError(
            f"cannot write to {output}: {error.strerror or error}. Choose an --output folder that you may write to."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(
                f"another process is preparing {output}. Wait for it or choose another --output."
            ) from error
        work = WorkingFolder(path, fingerprint)
        try:
            _open(work)
            yield work
        except OSError as error:
            raise DataError(
                f"cannot write {error.filename or path}: {error.strerror or error}. Make room or choose another "
                "--output; the same command then goes on."
            ) from error
        except RaptrError:
            if not work.done.sizes:
                _clean(output)
            raise
        _clean(output)


def _open(work: WorkingFolder) -> None:
    """Take over what the journal says is done, if it is that of this very preparation; else empty the folder."""
    journal = _read_journal(work.path)
    if journal.get("fingerprint") == work.fingerprint:
        work.done = Done(**journal["done"])
        return
    shutil.rmtree(work.path)
    work.path.mkdir()
    work.write_journal()


def _read_journal(path: Path) -> dict[str, Any]:
    try:
        journal = json.loads((path / JOURNAL).read_text())
    except (OSError, ValueError):
        return {}  # a journal is written aside and renamed: none, or a broken one, means to begin anew
    return journal if isinstance(journal, dict) else {}


def _clean(output: Path) -> None:
    """Remove the working folder and the lock, and the output folder too if nothing else is in it."""
    shutil.rmtree(output / WORK)
    (output / LOCK).unlink()
    if not any(output.iterdir()):
        output.rmdir()
