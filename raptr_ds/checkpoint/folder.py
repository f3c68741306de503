"""The folder of a run's checkpoints: the names in it, and how a checkpoint is created and deleted atomically.

Everything here runs on one rank. A folder named step-... is always complete: it is written under another name, renamed
when all of it is on the disk, and renamed again before it is deleted.
"""

import os
import re
import shutil
from collections.abc import Container
from itertools import count
from pathlib import Path

from raptr_ds.atomic_file import write_atomically
from raptr_ds.data.manifest import TOKENIZER
from raptr_ds.errors import CheckpointError
from raptr_ds.user_paths import is_file, is_folder, path_error

CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d{8,})")
_UNFINISHED, _REPLACED, _DELETED = ".unfinished-", ".replaced-", ".deleted-"
_SET_ASIDE = "set-aside-"
_KEPT_BRANCHES = 3  # so that a mistake in raptr_ds.checkpoint.load, and a second one, lose nothing


def step_folder(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint after `step` steps."""
    return folder / f"step-{step:08d}"


def unfinished_folder(folder: Path, step: int) -> Path:
    """Return the path under which the checkpoint after `step` steps is written."""
    return folder / f"{_UNFINISHED}step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """Return the step in a checkpoint folder's name, None for another folder."""
    match = _STEP.fullmatch(folder.name)
    return int(match[1]) if match else None


def checkpoints_in(folder: Path, not_after: int | None = None) -> list[Path]:
    """Return the checkpoints in a folder, newest first; with `not_after` only those up to this step.

    Raises: PathError if the folder cannot be read.
    """
    if not is_folder(folder):
        return []
    try:
        return _newest_first(folder, not_after)
    except OSError as error:
        raise path_error(folder, error) from error


def _newest_first(folder: Path, not_after: int | None = None) -> list[Path]:
    steps = {path: step for path in folder.iterdir() if (step := step_of(path)) is not None}
    allowed = [path for path, step in steps.items() if not_after is None or step <= not_after]
    return sorted(allowed, key=steps.__getitem__, reverse=True)


def checkpoints_at(where: Path, of_run_file: bool = False) -> list[Path]:
    """Return the checkpoints at a folder that a user gives, newest first: a run's, or the folder itself if it is one.

    of_run_file: the folder is raptr_ds.checkpoint.load.
    Raises: CheckpointError if there is none; PathError if the folder cannot be read.
    """
    has_manifest = is_file(where / MANIFEST) and not is_file(where / TOKENIZER)  # data folders have both
    if has_manifest or (step_of(where) is not None and is_folder(where)):
        return [where]
    found = checkpoints_in(where / CHECKPOINTS) or checkpoints_in(where)
    if not found:
        state = "there is no checkpoint in it" if is_folder(where) else "there is no such folder"
        key, others = ("raptr_ds.checkpoint.load=", ", or set it to auto or none") if of_run_file else ("", "")
        raise CheckpointError(
            f"{key}{where}: {state}. Name a run that has saved one, its {CHECKPOINTS} folder or one step-... folder"
            f"{others}."
        )
    return found


def tidy(folder: Path) -> list[str]:
    """Clean up after processes that died: remove unfinished and deleted checkpoints, restore half-replaced ones.

    What cannot be removed now, such as a file that another machine has open (NFS), is left to the next start. Returns
    messages to print.
    """
    done = []
    for path in sorted(folder.glob(".*-step-*")):
        if path.name.startswith(_REPLACED):
            original = folder / path.name.removeprefix(_REPLACED)
            if not original.exists():
                path.rename(original)
                done.append(f"restored {original}, which a process was replacing when it died")
                continue
        if path.name.startswith((_UNFINISHED, _REPLACED, _DELETED)):
            try:
                path.unlink() if path.is_symlink() else shutil.rmtree(path)
            except OSError as error:
                done.append(f"{path} cannot be removed: {error.strerror or error}")
                continue
            if path.name.startswith(_UNFINISHED):
                done.append(f"removed {path}, which a process was writing when it died")
    return done


def publish(unfinished: Path, final: Path, manifest: bytes) -> None:
    """Complete a checkpoint whose tensor files are on the disk: write the manifest and give the folder its final name.

    Raises: OSError; an earlier checkpoint of that name is then still there.
    """
    write_atomically(unfinished / MANIFEST, manifest)
    sync_folder(unfinished)
    replaced = final.with_name(_REPLACED + final.name)
    if final.exists():  # an earlier save of this step: a rename cannot replace a folder that is not empty
        final.rename(replaced)
    try:
        unfinished.replace(final)
    except OSError:
        if replaced.exists():
            replaced.rename(final)
        raise
    sync_folder(final.parent)


def outdated(folder: Path, step: int, keep: int, held: Container[int] = ()) -> list[Path]:
    """Rename all but the `keep` newest checkpoints up to `step`, and return what is to be deleted.

    Checkpoints after `step` belong to an abandoned branch of the run and are not counted. held: steps whose checkpoints
    stay in any case.
    Raises: OSError.
    """
    older = [path for path in _newest_first(folder, not_after=step)[keep:] if (step_of(path) or 0) not in held]
    return [_marked_as_deleted(path) for path in (*older, *sorted(folder.glob(_REPLACED + "step-*")))]


def _marked_as_deleted(path: Path) -> Path:
    """Rename a checkpoint, so that its name is free and a crash while it is deleted leaves none that looks whole."""
    names = (f"{_DELETED}{number}-{path.name}" for number in count())
    return path.rename(next(free for name in names if not (free := path.with_name(name)).exists()))


def set_aside(folder: Path, after: int) -> Path | None:
    """Move the checkpoints after step `after`, an abandoned branch of the run, to a new folder set-aside-N.

    In place they would later be taken for the newest ones. Returns the new folder, None if there was nothing to move.
    A few of these folders are kept: see `outdated_branches`.
    Raises: OSError.
    """
    later = [path for path in _newest_first(folder) if (step_of(path) or 0) > after]
    if not later:
        return None
    aside = folder / f"{_SET_ASIDE}{max(_branches(folder), default=0) + 1}"
    aside.mkdir()
    for path in later:
        path.rename(aside / path.name)
    sync_folder(folder)
    return aside


def outdated_branches(folder: Path) -> list[Path]:
    """Return the folders of abandoned branches that are to be deleted: all but the three newest."""
    branches = _branches(folder)
    return [branches[number] for number in sorted(branches)[:-_KEPT_BRANCHES]]


def _branches(folder: Path) -> dict[int, Path]:
    numbers = {path.name.removeprefix(_SET_ASIDE): path for path in folder.glob(f"{_SET_ASIDE}*")}
    return {int(number): path for number, path in numbers.items() if number.isdecimal()}


def sync_folder(folder: Path) -> None:
    """Put a folder's directory entries on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
