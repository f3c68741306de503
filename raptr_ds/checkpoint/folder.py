"""The folder of a run's checkpoints: what lies in it under which name, and how a checkpoint appears and goes whole.

Everything here runs on one rank. A folder named step-... is complete, always: it is filled under another name, renamed
when all of it is on the disk, and renamed again before it is deleted.
"""

import os
import re
import shutil
from pathlib import Path

from raptr_ds.atomic_file import write_atomically
from raptr_ds.checkpoint.manifest import MANIFEST
from raptr_ds.errors import CheckpointError

CHECKPOINTS = "checkpoints"
_STEP = re.compile(r"step-(\d{8,})")
_UNFINISHED, _REPLACED, _DELETED = ".unfinished-", ".replaced-", ".deleted-"
_SET_ASIDE = "set-aside-"


def step_folder(folder: Path, step: int) -> Path:
    """Return where the checkpoint after `step` steps stands."""
    return folder / f"step-{step:08d}"


def unfinished_folder(folder: Path, step: int) -> Path:
    """Return where the checkpoint after `step` steps is being written."""
    return folder / f"{_UNFINISHED}step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """Return the step in a checkpoint folder's name, None for another folder."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def checkpoints_in(folder: Path, not_after: int | None = None) -> list[Path]:
    """Return the checkpoints in a folder, newest first; with `not_after` those of this step and before."""
    if not folder.is_dir():
        return []
    steps = {path: step for path in folder.iterdir() if (step := step_of(path)) is not None}
    allowed = [path for path, step in steps.items() if not_after is None or step <= not_after]
    return sorted(allowed, key=steps.__getitem__, reverse=True)


def checkpoints_at(where: Path) -> list[Path]:
    """Return what a user's FOLDER means: the checkpoints of a run, newest first, or the one checkpoint.

    Raises: CheckpointError if there is none.
    """
    if (where / MANIFEST).is_file() or (step_of(where) is not None and where.is_dir()):
        return [where]
    found = checkpoints_in(where / CHECKPOINTS) or checkpoints_in(where)
    if not found:
        state = "there is no checkpoint in it" if where.is_dir() else "there is no such folder"
        raise CheckpointError(
            f"raptr_ds.checkpoint.load={where}: {state}. Give a run's folder, its {CHECKPOINTS} folder or one "
            "step-... folder, or auto, or none."
        )
    return found


def tidy(folder: Path) -> list[str]:
    """Finish what dead writers left: remove unfinished and deleted checkpoints, put a replaced one back if need be.

    Returns what was done, for people.
    """
    done = []
    for path in sorted(folder.glob(".*-step-*")):
        if path.name.startswith(_REPLACED):
            original = folder / path.name.removeprefix(_REPLACED)
            if not original.exists():
                path.rename(original)
                done.append(f"put {original} back, which a dead writer was about to replace")
                continue
        if path.name.startswith((_UNFINISHED, _REPLACED, _DELETED)):
            shutil.rmtree(path)
            if path.name.startswith(_UNFINISHED):
                done.append(f"removed {path}, which a dead writer had not finished")
    return done


def publish(unfinished: Path, final: Path, manifest: bytes) -> None:
    """Complete a checkpoint whose tensor files are on the disk: manifest, then the name that makes it count.

    Raises: OSError; what had that name before is then still there.
    """
    write_atomically(unfinished / MANIFEST, manifest)
    sync_folder(unfinished)
    replaced = final.with_name(_REPLACED + final.name)
    if final.exists():  # a second save at one step: a rename replaces no folder that has content
        final.rename(replaced)
    try:
        unfinished.replace(final)
    except OSError:
        if replaced.exists():
            replaced.rename(final)
        raise
    sync_folder(final.parent)


def outdated(folder: Path, step: int, keep: int) -> list[Path]:
    """Take all but the `keep` newest checkpoints up to `step` out of the list of checkpoints; return what to delete.

    Checkpoints after `step` are of another course of the run and count for nothing here.
    """
    older = [path for path in checkpoints_in(folder) if (step_of(path) or 0) <= step][keep:]
    deleted = []
    for path in older:
        aside = path.with_name(_DELETED + path.name)
        path.rename(aside)
        deleted.append(aside)
    return deleted + sorted(folder.glob(_REPLACED + "step-*"))


def set_aside(folder: Path, after: int) -> Path | None:
    """Move checkpoints after step `after`, which the run will not continue from, into a folder of their own.

    Left in place they would be taken for the newest later on. Returns that folder, None if there was nothing to move.
    """
    later = [path for path in checkpoints_in(folder) if (step_of(path) or 0) > after]
    if not later:
        return None
    number = 1
    while (aside := folder / f"{_SET_ASIDE}{number}").exists():
        number += 1
    aside.mkdir()
    for path in later:
        path.rename(aside / path.name)
    sync_folder(folder)
    return aside


def sync_folder(folder: Path) -> None:
    """Put a folder's list of names on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
