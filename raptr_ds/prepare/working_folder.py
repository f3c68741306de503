"""Unfinished work on disk: a locked folder, a journal of what is done, and the token files, which only grow.

The journal records how long the token files were when it was written. After an interruption they are cut to that length
and the rest is done again, so that the finished files are the same as without the interruption.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from raptr_ds.atomic_file import write_atomically
from raptr_ds.errors import DataError, RaptrError
from raptr_ds.json_text import parse_json
from raptr_ds.prepare.index_writer import write_index
from raptr_ds.user_paths import exists, take_lock, write_error, writing

WORK = ".prepare"
LOCK = ".lock"
JOURNAL = "journal.json"
TRAIN, VALIDATION = SPLITS = ("train", "validation")
LARGEST_VALIDATION_SHARE = 10
_FILES = tuple(f"{split}.{suffix}" for split in SPLITS for suffix in ("bin", "lengths"))
_REWRITTEN = "rewritten"  # there if the training split no longer begins with what the journal counts
_LENGTH = np.dtype(np.int32)
_FIX = "Choose an --output folder that you may write to."


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
    """The folder, and how much of the preparation with this fingerprint is done."""

    path: Path
    fingerprint: str
    done: Done = field(default_factory=Done)

    def write_journal(self) -> None:
        """Record what is done; the files that hold it must be on disk already."""
        journal = {"fingerprint": self.fingerprint, "done": asdict(self.done)}
        write_atomically(self.path / JOURNAL, json.dumps(journal))


@contextmanager
def working_folder(output: Path, fingerprint: str, report: Callable[[str], None]) -> Iterator[WorkingFolder]:
    """Yield the working folder in `output`, emptied unless it belongs to the same preparation; remove it at the end.

    After an interruption it stays, for the same command to continue; after a user's error only if text was encoded.
    Without that `output` goes too, if it was made here and nothing else is in it.
    report: prints a line where the work of another preparation is thrown away.
    Raises: DataError if another process is using it; PathError or StorageError if it cannot be written.
    """
    path, is_new = output / WORK, not exists(output)
    with writing(output, _FIX):
        path.mkdir(parents=True, exist_ok=True)
        file = (output / LOCK).open("w")
    with file:
        if not take_lock(file, output):
            raise DataError(f"another process is preparing {output}. Wait for it or choose another --output.")
        work = WorkingFolder(path, fingerprint)
        try:
            _continue_or_empty(work, report)
            yield work
        except OSError as error:
            raise write_error(error.filename or path, error, f"{_FIX} The same command continues.") from error
        except RaptrError:
            if not work.done.sizes:
                _remove(output)
                if is_new and not any(output.iterdir()):
                    output.rmdir()
            raise
        _remove(output)


def _continue_or_empty(work: WorkingFolder, report: Callable[[str], None]) -> None:
    """Take over what the journal records as done if it is from the same preparation; else empty the folder."""
    try:
        journal = parse_json((work.path / JOURNAL).read_text())
        done = Done(**journal["done"])
        if journal["fingerprint"] == work.fingerprint:
            work.done = done
            return
        if done.documents:
            report(
                f"starting again: the unfinished work in {work.path}, {done.documents:,} documents, was for other text "
                "or other settings."
            )
    except (OSError, ValueError, LookupError, TypeError):
        pass  # a missing or damaged journal means to start again
    shutil.rmtree(work.path)
    work.path.mkdir()
    work.write_journal()


def _remove(output: Path) -> None:
    """Remove the working folder and the lock."""
    shutil.rmtree(output / WORK)
    (output / LOCK).unlink()


@dataclass(frozen=True)
class SplitWriter:
    """Appends the tokens of documents to SPLIT.bin and their lengths to SPLIT.lengths; writes SPLIT.idx at the end."""

    folder: Path
    dtype: np.dtype
    eos_id: int

    def restore(self, sizes: dict[str, int]) -> bool:
        """Cut the files to the sizes that `sync` returned; if they hold something else, empty them and return False."""
        for name in _FILES:
            (self.folder / name).touch()
        is_rewritten = (self.folder / _REWRITTEN).exists()
        are_there = bool(sizes) and all((self.folder / name).stat().st_size >= sizes[name] for name in _FILES)
        possible = are_there and not is_rewritten
        for name in _FILES:
            os.truncate(self.folder / name, sizes[name] if possible else 0)
        (self.folder / _REWRITTEN).unlink(missing_ok=True)
        return possible

    def append(self, split: str, documents: Sequence[np.ndarray]) -> None:
        """Append documents, each (n,) token ids with its end-of-document token."""
        if documents:
            self._append(f"{split}.bin", np.concatenate(documents).astype(self.dtype))
            self._append(f"{split}.lengths", np.array([len(document) for document in documents], _LENGTH))

    def sync(self) -> dict[str, int]:
        """Wait until everything is on disk and return the size in bytes of each file."""
        sizes = {}
        for name in _FILES:
            with (self.folder / name).open("ab") as stream:
                os.fsync(stream.fileno())
                sizes[name] = stream.tell()
        return sizes

    def finish(self, min_validation_tokens: int) -> dict[str, dict[str, int]]:
        """Write the indices and return the documents and tokens of each split.

        If the hash held out fewer than `min_validation_tokens`, documents from the end of the training split follow,
        with their copies, and a part of the last one, up to about a tenth of all tokens: even one small document gives
        both splits.
        Raises: DataError if there is too little text for two splits.
        """
        if len(self._lengths(TRAIN)) == 0:  # the hash held out all of a few documents
            for suffix in ("bin", "lengths"):
                (self.folder / f"{VALIDATION}.{suffix}").replace(self.folder / f"{TRAIN}.{suffix}")
                (self.folder / f"{VALIDATION}.{suffix}").touch()
        num_train, num_validation = (int(self._lengths(split).sum(dtype=np.int64)) for split in SPLITS)
        total = num_train + num_validation
        missing = min(min_validation_tokens, max(2, total // LARGEST_VALIDATION_SHARE)) - num_validation
        if missing > 0:
            if num_train < missing + 2:
                raise DataError(
                    f"the corpus of {total} tokens is too small for a training and a validation split. Add text to "
                    "--input."
                )
            self._move_tail(missing)
        counts = {}
        for split in SPLITS:
            lengths = self._lengths(split)
            write_index(self.folder / f"{split}.idx", lengths, self.dtype)
            counts[split] = {"documents": len(lengths), "tokens": int(lengths.sum(dtype=np.int64))}
        return counts

    def _move_tail(self, missing: int) -> None:
        """Move at least `missing` tokens from the end of the training split to the validation split.

        Complete documents move, the last one first, as long as none is longer than twice what is still missing. Of a
        longer one, or of the only one left, the last `missing` tokens move, and what stays gets a new end, here $:

            train  a a $ | b b b b b $ | c c $     missing: 5
            ->     a a $ | b b b $                 validation  c c $ | b $

        Copies of a document move together, as one document of their length together; too long ones are passed over,
        and move in the end, the shortest first, if nothing else is left. Where that would take more than half of the
        text, as in one of nothing but copies, these count as different documents.
        """
        tokens, lengths = np.memmap(self.folder / f"{TRAIN}.bin", self.dtype, "r"), self._lengths(TRAIN)
        ends = lengths.cumsum(dtype=np.int64)
        starts = ends - lengths
        keys = [_key(tokens[start:end]) for start, end in zip(starts, ends, strict=True)]
        chosen = _chosen(lengths, np.array(keys, np.uint64), missing) or _chosen(
            lengths, np.arange(len(lengths)), missing
        )
        assert chosen is not None  # `finish` has counted
        moved, left = chosen
        self.append(VALIDATION, [tokens[starts[index] + left.get(index, 0) : ends[index]] for index in [*moved, *left]])
        (self.folder / _REWRITTEN).touch()
        lengths[list(left)] = list(left.values())
        stays = np.ones(len(lengths), bool)
        stays[moved] = False
        first = min(*moved, *left, len(lengths))
        with (self.folder / f"{TRAIN}.bin").open("r+b") as stream:  # each document moves down, if it moves at all
            stream.seek(int(starts[first]) * self.dtype.itemsize)
            for index in np.flatnonzero(stays[first:]) + first:
                stream.write(tokens[starts[index] : starts[index] + lengths[index] - 1].tobytes())
                stream.write(np.array([self.eos_id], self.dtype).tobytes())
            stream.truncate()
        (self.folder / f"{TRAIN}.lengths").write_bytes(lengths[stays].tobytes())

    def _append(self, name: str, values: np.ndarray) -> None:
        with (self.folder / name).open("ab") as stream:
            stream.write(values.tobytes())

    def _lengths(self, split: str) -> np.ndarray:
        return np.fromfile(self.folder / f"{split}.lengths", _LENGTH)


def _key(tokens: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=8).digest(), "little")


def _chosen(lengths: np.ndarray, keys: np.ndarray, missing: int) -> tuple[list[int], dict[int, int]] | None:
    """Return the documents that move, in order, and one that is cut, with the length that is left of it.

    keys: of documents, equal ones of copies. None if these documents cannot give `missing` tokens.
    """
    moved: list[int] = []
    passed: list[tuple[int, np.ndarray]] = []  # copies that are longer together than what is missing
    seen = np.zeros(len(lengths), bool)
    for last in reversed(range(len(lengths))):
        if missing <= 0:
            break
        if seen[last]:
            continue
        copies = np.flatnonzero(keys == keys[last])
        seen[copies] = True
        length = int(lengths[copies].sum(dtype=np.int64))
        if length <= 2 * missing and len(moved) + len(copies) < len(lengths):
            moved += copies[::-1].tolist()
            missing -= length
        elif len(copies) == 1:
            return moved, {last: length - missing}
        else:
            passed.append((length, copies))
    stays = int(lengths.sum(dtype=np.int64) - lengths[moved].sum(dtype=np.int64))
    for length, copies in sorted(passed, key=lambda one: one[0]):
        if missing <= 0 or 2 * length > stays:
            break
        moved += copies[::-1].tolist()
        missing, stays = missing - length, stays - length
    return (moved, {}) if missing <= 0 else None
