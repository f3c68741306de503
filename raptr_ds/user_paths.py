"""Paths that users name: what is at one, or an error that says why this cannot be found out.

`pathlib` answers no for a path without anything there, but raises for one in a folder that may not be entered, one with
a name that is too long, and one with a NUL byte. Every path from a run file or a command line is asked about here.
"""

import errno
import fcntl
import io
import shlex
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from raptr_ds.errors import ConfigError, Exit, RaptrError, StorageError

_NOTHING_THERE = {errno.ENOENT, errno.ENOTDIR}
_FIXES = {
    errno.EACCES: "Give your user permission to enter every folder on the way to it, or name another path.",
    errno.ENAMETOOLONG: "Name a shorter path.",
    errno.ELOOP: "Its links lead in a circle: name the file or folder itself.",
}
_AWAY = {
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EREMOTEIO,
    errno.ENOTCONN,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ESHUTDOWN,
}
_FULL = {errno.ENOSPC, errno.EDQUOT}  # which nobody meets who reads
_PASSING = _AWAY | _FULL | {errno.EROFS, errno.EIO}

FIX_SAVE = "Set raptr_ds.train.save to a folder that this user may create or write."


class PathError(RaptrError):
    """A path that the user named cannot be looked at: no permission, a name that is too long, a failing disk."""

    exit_code = Exit.USER_ERROR


def is_file(path: str | Path) -> bool:
    """Return whether there is a regular file, or a link to one. Raises: PathError."""
    mode = _mode(path)
    return mode is not None and stat.S_ISREG(mode)


def is_folder(path: str | Path) -> bool:
    """Return whether there is a folder, or a link to one. Raises: PathError."""
    mode = _mode(path)
    return mode is not None and stat.S_ISDIR(mode)


def exists(path: str | Path) -> bool:
    """Return whether there is anything at the path; not a link to nothing. Raises: PathError."""
    return _mode(path) is not None


def open_to_all(folder: str | Path) -> str | None:
    """Return a warning, with the fix, if every user may write to a folder; else None. Raises: PathError."""
    mode = _mode(folder)
    if mode is None or not mode & stat.S_IWOTH:
        return None
    return (
        f"every user may write to {_printable(folder)} (mode {stat.S_IMODE(mode):o}), and so replace the run's "
        f"checkpoints: chmod o-w {shlex.quote(str(folder))}"
    )


def path_error(path: str | Path, error: OSError | ValueError) -> RaptrError:
    """Return the error to raise where the operating system refuses a path that the user named."""
    if isinstance(error, OSError):
        if is_full(error):
            return write_error(path, error, "")
        if (away := read_error(path, error)) is not None:
            return away
        why, fix = error.strerror or str(error), _FIXES.get(error.errno or 0, "")
    else:
        why, fix = "it holds a NUL byte, which no path may hold", "Name another path."
    return PathError(f"{_printable(path)} cannot be used: {why}. {fix}".rstrip())


def is_full(error: OSError) -> bool:
    """Return whether the disk, or the user's part of it, has no room for what was written."""
    return error.errno in _FULL


def make_folder(folder: Path) -> None:
    """Make a run's folder, or one in it, and those above it. Raises: PathError or StorageError."""
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        raise path_error(folder, error) from error


def check_output(file: Path | None, option: str, example: str) -> None:
    """Make the folder of a file that an option names, before any work that could not be written there at its end.

    file: None is none. example: a file's name.
    Raises: ConfigError for a folder; PathError or StorageError if nothing can be written there.
    """
    if file is None:
        return
    if is_folder(file):
        raise ConfigError(f"{option} {file} is a folder: name a file in it, such as {file / example}.")
    if exists(file) and not is_file(file):  # a terminal or a pipe
        return
    with writing(file, f"Choose another {option}."):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass


def take_lock(file: IO, folder: Path) -> bool:
    """Lock an open file of a folder for this process, and those that inherit it; return False if another has the lock.

    Raises: PathError if the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # as of Lustre mounted without flock, and of NFS without its lock service
        raise PathError(
            f"{_printable(folder)} cannot be locked: {error.strerror or error}. Name a folder on another file system."
        ) from error
    return True


@contextmanager
def claimed(folder: Path, program: str, fix: str) -> Iterator[None]:
    """Make a folder and lock it for this process. program: what works there; fix: what to do if it cannot be had.

    Raises: ConfigError if another process works there, PathError or StorageError if it cannot be written or locked.
    """
    make_folder(folder)
    with writing(folder, fix):
        file = (folder / ".lock").open("w")
    with file:
        if not take_lock(file, folder):
            raise ConfigError(f"another {program} works in {_printable(folder)}. Wait for it. {fix}")
        yield


@contextmanager
def writing(path: Path, fix: str = FIX_SAVE) -> Iterator[None]:
    """Raise PathError or StorageError where the block cannot write to a file or folder; fix: as in `write_error`."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error, fix) from error


def write_error(path: str | Path, error: OSError, fix: str) -> RaptrError:
    """Return the error to raise where a file or folder that the user named cannot be written.

    fix: what to do where it is the user's mistake. A disk that is full, failing or away is none.
    """
    why = f"{_printable(path)} cannot be written: {error.strerror or error}"
    if error.errno in _PASSING:
        return StorageError(f"{why}. Make room on the disk or bring it back, and start again.")
    return PathError(f"{why}. {fix}")


def read_error(path: str | Path, error: OSError) -> StorageError | None:
    """Return the error to raise where a file cannot be read because its file system is away; None if that is not why.

    A failing disk (EIO) is not: what is on it may stay unreadable.
    """
    if error.errno not in _AWAY:
        return None
    return StorageError(
        f"{_printable(path)} cannot be read: {error.strerror}. Its file system is away: bring it back, and start again."
    )


def print_any_name() -> None:
    """Have standard output escape characters that it cannot print: not every name can be printed everywhere."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _mode(path: str | Path) -> int | None:
    try:
        return Path(path).stat().st_mode
    except OSError as error:
        if error.errno in _NOTHING_THERE:
            return None
        raise path_error(path, error) from error
    except ValueError as error:  # "embedded null byte"
        raise path_error(path, error) from error


def _printable(path: str | Path) -> str:
    text = str(path).replace("\0", "\\0")
    return text if len(text) <= 200 else f"{text[:100]}...{text[-60:]} ({len(text)} characters)"
