"""Which files --input stands for: every entry of a folder is read, counted by its kind, or an error."""

import errno
import os
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from raptr_ds.errors import DataError
from raptr_ds.prepare.corpus import FileSource
from raptr_ds.prepare.readers import KNOWN_SUFFIXES, ReadingOptions, check_file, suffix_of
from raptr_ds.prepare.streams import COMPRESSED_SUFFIXES
from raptr_ds.user_paths import exists, is_file, is_folder, path_error

# A .json in a folder may well describe the data rather than be the data: it is read only when it is named itself.
FOUND_IN_FOLDERS = tuple(suffix for suffix in KNOWN_SUFFIXES if suffix != ".json")
READ_ALREADY = "read already under another name"
MOST_KINDS = 10


def file_sources(paths: Sequence[str | Path], options: ReadingOptions) -> tuple[list[FileSource], Counter[str]]:
    """Return the sources of files and folders, and how much is not read, by kind.

    Folders are read with all that is in them, in the order of the names; links are followed, hidden entries are not
    read, and a file that has several names is read once.
    Raises: DataError or PathError if a path or an entry leads nowhere or cannot be read, if a path is empty or a pipe,
        if a file is an archive, or a folder holds nothing to read.
    """
    sources: list[FileSource] = []
    ignored: Counter[str] = Counter()
    seen: set[object] = set()
    for path in paths:
        files = [Path(path)] if _is_one_file(path) else _known_files(Path(path), ignored)
        files = [file for file in files if _is_new(file, seen, ignored)]
        for file in files:
            check_file(file)
        sources += [FileSource(file, options) for file in files]
    return sources, ignored


def summary(ignored: Counter[str]) -> str:
    """Return counts by kind as text, the largest first: "2 .png, 1 hidden"."""
    kinds = [f"{count:,} {kind}" for kind, count in ignored.most_common(MOST_KINDS) if count]
    others = ignored.total() - sum(count for _, count in ignored.most_common(MOST_KINDS))
    return ", ".join([*kinds, *([f"{others:,} of other kinds"] if others else [])])


def _is_one_file(path: str | Path) -> bool:
    """Return whether an input is a file rather than a folder. Raises: DataError if it is neither, PathError."""
    if not str(path):
        raise DataError("an empty path was given to --input. Give files or folders.")
    if is_file(path):
        return True
    if is_folder(path):
        return False
    if exists(path) or str(path) == "-":
        raise DataError(
            f"the input {path} is not a file or folder but a pipe or device, which can be read only once and has no "
            "ending that says what it holds. Write its content to a file that ends in .txt or .jsonl, and name that. "
            f"Compressed files ({', '.join(COMPRESSED_SUFFIXES)}) can be named as they are."
        )
    if Path(path).is_symlink():
        raise _leads_nowhere(Path(path))
    raise DataError(f"the input {path} does not exist. Give files or folders to --input.")


def _known_files(folder: Path, ignored: Counter[str]) -> list[Path]:
    """Return the files in a folder and the folders in it that have a known ending; count all else.

    Raises: DataError if there are none, and as _status and _entries do.
    """
    known: list[Path] = []
    others: Counter[str] = Counter()
    seen: set[object] = set()
    left = [folder]
    while left:
        path = left.pop()
        if path != folder and path.name.startswith("."):
            others["hidden"] += 1
            continue
        mode = _status(path).st_mode
        if stat.S_ISDIR(mode):
            if _is_new(path, seen, others):
                left += sorted(_entries(path), reverse=True)
        elif not stat.S_ISREG(mode):
            others["pipes, sockets or devices"] += 1
        elif suffix_of(path) in FOUND_IN_FOLDERS:
            known.append(path)
        else:
            others[_ending(path)] += 1
    if not known:
        raise DataError(
            f"the folder {folder} holds no file that ends in {', '.join(FOUND_IN_FOLDERS)} (or "
            f"{', '.join(COMPRESSED_SUFFIXES)} after them); it holds {summary(others) or 'nothing'}. Name the files "
            "themselves: then other endings are read as text."
        )
    ignored += others
    return known


def _is_new(path: Path, seen: set[object], ignored: Counter[str]) -> bool:
    """Return whether a file or folder was not met before, under any of its names, and remember it."""
    status = _status(path)
    key = (status.st_dev, status.st_ino) if status.st_ino else path.resolve()  # some file systems do not number files
    if key in seen:
        ignored[READ_ALREADY] += 1
        return False
    seen.add(key)
    return True


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR) and path.is_symlink():
            raise _leads_nowhere(path) from error
        raise path_error(path, error) from error


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise path_error(folder, error) from error


def _leads_nowhere(link: Path) -> DataError:
    return DataError(
        f"{link} is a link to {link.readlink()}, where nothing is. Remove the link, or restore what it leads to."
    )


def _ending(path: Path) -> str:
    """Return what to call a file's kind, .tar.gz for one."""
    suffix = path.suffix.lower()
    return (suffix_of(path) + suffix if suffix in COMPRESSED_SUFFIXES else suffix) or "without an ending"
