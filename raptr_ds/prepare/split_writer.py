"""Append documents to the .bin files of both splits so that an interrupted preparation can go on."""

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np

from raptr_ds.data.indexed import write_index
from raptr_ds.errors import DataError

SPLITS = ("train", "validation")
LARGEST_VALIDATION_SHARE = 10


class SplitWriter:
    """Writes tokens to SPLIT.bin and lengths to SPLIT.lengths, and at the end SPLIT.idx."""

    def __init__(self, folder: Path, dtype: np.dtype, eos_id: int, mode: str = "wb") -> None:
        """Begin empty files in `folder`, or with mode `ab` go on with those that are there."""
        self.folder = folder
        self.dtype = dtype
        self.eos_id = eos_id
        self._streams: dict[str, IO[bytes]] = {}
        for split in SPLITS:
            for suffix in ("bin", "lengths"):
                name = f"{split}.{suffix}"
                self._streams[name] = (folder / name).open(mode)

    @classmethod
    def resume(cls, folder: Path, dtype: np.dtype, eos_id: int, sizes: dict[str, int]) -> "SplitWriter | None":
        """Go on after the flush that returned `sizes`, cutting off what was written later; None if less is there."""
        if not sizes:
            return None
        for name, size in sizes.items():
            path = folder / name
            if not path.exists() or path.stat().st_size < size:
                return None
            os.truncate(path, size)
        return cls(folder, dtype, eos_id, "ab")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in self._streams.values():
            stream.close()

    def append(self, split: str, documents: Sequence[np.ndarray]) -> None:
        """Append documents, each (n,) token ids with its end-of-document token."""
        if not documents:
            return
        self._streams[f"{split}.bin"].write(np.concatenate(documents).astype(self.dtype).tobytes())
        self._streams[f"{split}.lengths"].write(np.array([len(d) for d in documents], np.int32).tobytes())

    def flush(self) -> dict[str, int]:
        """Put everything on disk and return the size in bytes of each file."""
        sizes = {}
        for name, stream in self._streams.items():
            stream.flush()
            os.fsync(stream.fileno())
            sizes[name] = (self.folder / name).stat().st_size
        return sizes

    def finish(self, min_validation_tokens: int) -> dict[str, dict[str, int]]:
        """Write the indices and return the documents and tokens of each split.

        If the hash held out fewer than `min_validation_tokens`, documents from the end of the training split follow,
        and a part of the last one, up to a tenth of all tokens: even one small document gives both splits.
        Raises: DataError if there is too little text for two splits.
        """
        tokens = {split: self._read(split, "bin", self.dtype) for split in SPLITS}
        lengths = {split: self._read(split, "lengths", np.dtype(np.int32)) for split in SPLITS}
        total = sum(map(len, tokens.values()))
        wanted = min(min_validation_tokens, max(2, total // LARGEST_VALIDATION_SHARE))
        if len(tokens["train"]) == 0:
            self._swap()
            return self.finish(min_validation_tokens)
        missing = wanted - len(tokens["validation"])
        if missing > 0:
            if len(tokens["train"]) < missing + 2:
                raise DataError(
                    f"the corpus of {total} tokens is too small for a training and a validation split. Add text to "
                    "--input."
                )
            self._move_tail(missing, lengths["train"], tokens["train"])
            lengths = {split: self._read(split, "lengths", np.dtype(np.int32)) for split in SPLITS}
        counts = {}
        for split in SPLITS:
            write_index(self.folder / f"{split}.idx", lengths[split], self.dtype)
            counts[split] = {"documents": len(lengths[split]), "tokens": int(lengths[split].sum(dtype=np.int64))}
        return counts

    def _read(self, split: str, suffix: str, dtype: np.dtype) -> np.ndarray:
        path = self.folder / f"{split}.{suffix}"
        return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)

    def _swap(self) -> None:
        """Exchange the splits: the hash held out every one of a few documents."""
        for suffix in ("bin", "lengths"):
            train, validation = (self.folder / f"{split}.{suffix}" for split in SPLITS)
            aside = self.folder / f"aside.{suffix}"
            train.rename(aside)
            validation.rename(train)
            aside.rename(validation)

    def _move_tail(self, missing: int, lengths: np.ndarray, tokens: np.ndarray) -> None:
        """Move at least `missing` tokens from the end of train to validation: whole documents while that many are
        wanted, then, from a document longer than the rest, its last tokens."""
        moved: list[np.ndarray] = []
        kept = list(map(int, lengths))
        end = len(tokens)
        while missing > 0:
            length = kept.pop()
            if length > 2 * missing or not kept:
                moved.append(np.array(tokens[end - missing : end]))
                kept.append(length - missing)
                end -= missing
                break
            moved.append(np.array(tokens[end - length : end]))
            end -= length
            missing -= length
        with (self.folder / "validation.bin").open("ab") as stream:
            stream.write(np.concatenate(moved).tobytes())
        with (self.folder / "validation.lengths").open("ab") as stream:
            stream.write(np.array([len(document) for document in moved], np.int32).tobytes())
        with (self.folder / "train.bin").open("r+b") as stream:
            stream.truncate(end * self.dtype.itemsize)
            stream.seek((end - 1) * self.dtype.itemsize)  # the end of a cut document says so
            stream.write(np.array([self.eos_id], self.dtype).tobytes())
        (self.folder / "train.lengths").write_bytes(np.array(kept, np.int32).tobytes())
