"""Where text comes from: files, folders, Hugging Face datasets, and several sources as one without repetitions.

A source can be read again and again, and yields the same documents in the same order each time.
"""

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from raptr_ds.errors import DataError
from raptr_ds.prepare.readers import ReadingCounts, ReadingOptions, documents_of_file, texts_of_rows
from raptr_ds.user_paths import is_file, is_folder, path_error

SHORTEST = 40  # characters of a paragraph that may not be repeated


class Source(Protocol):
    """A corpus of documents."""

    @property
    def name(self) -> str:
        """What the corpus is called in messages and manifests."""
        ...

    def documents(self, counts: ReadingCounts) -> Iterator[str]:
        """Yield documents: non-empty text that encodes as UTF-8."""
        ...

    def fingerprint(self) -> str:
        """Return a digest that changes when the documents may have changed."""
        ...

    def size_bytes(self) -> int | None:
        """Return roughly how much there is to read, for the progress bar; None if unknown."""
        return None


@dataclass(frozen=True)
class FileSource:
    """One file of text, JSONL or Parquet; the first two may be compressed. Unknown endings are read as text."""

    path: Path
    options: ReadingOptions

    @property
    def name(self) -> str:
        """The path as given."""
        return str(self.path)

    def documents(self, counts: ReadingCounts) -> Iterator[str]:
        """Return the documents of the file, in order."""
        return documents_of_file(self.path, self.options, counts)

    def fingerprint(self) -> str:
        """Digest of path, size, modification time and options."""
        status = self._status()
        return digest_of(str(self.path.resolve()), status.st_size, status.st_mtime_ns, repr(self.options))

    def size_bytes(self) -> int:
        """Size on disk."""
        return self._status().st_size

    def _status(self) -> os.stat_result:
        try:
            return self.path.stat()
        except (OSError, ValueError) as error:
            raise path_error(self.path, error) from error


@dataclass(frozen=True)
class DatasetSource(Source):
    """A dataset of the Hugging Face hub (or a local folder that `datasets` understands), streamed."""

    dataset: str
    config: str | None
    split: str
    options: ReadingOptions

    @property
    def name(self) -> str:
        """Name, configuration and split."""
        return "/".join(part for part in (self.dataset, self.config, self.split) if part)

    def documents(self, counts: ReadingCounts) -> Iterator[str]:
        """Yield the text column of every row.

        Raises: DataError if `datasets` is missing or cannot load it, or there is no such column.
        """
        rows = ((f"{self.name} row {number}", row) for number, row in enumerate(self._rows()))
        yield from texts_of_rows(rows, self.name, self.options, counts)

    def fingerprint(self) -> str:
        """Digest of name, configuration, split and options, and of the names, sizes and modification times of a
        folder's files; changes on the hub are not noticed."""
        folder = Path(self.dataset)
        names = sorted(path for path in folder.rglob("*") if is_file(path)) if is_folder(folder) else []
        files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in names]
        return digest_of(self.dataset, self.config or "", self.split, repr(self.options), *files)

    def _rows(self) -> Iterator[Any]:
        try:
            import datasets
        except ImportError as error:
            raise DataError("--dataset needs the package `datasets`: pip install datasets.") from error
        try:
            yield from datasets.load_dataset(self.dataset, self.config, split=self.split, streaming=True)
        except Exception as error:  # datasets raises many kinds, its own and those of the network, at any row
            raise DataError(
                f"cannot load the dataset {self.name}: {type(error).__name__}: {error}. Check --dataset, "
                "--dataset-config and --dataset-split, and that the hub or a cached copy can be reached; the same "
                "command then continues."
            ) from error


@dataclass(frozen=True)
class DistinctParagraphs:
    """Several sources as one, without the paragraphs that came before.

    Paragraphs are separated by blank lines and compared without regard to spaces and case. Those shorter than
    SHORTEST characters (headings, signatures) always stay, but a document of which nothing else is left is dropped. A
    paragraph held out for validation therefore never also appears in the training text.
    """

    sources: tuple[Source, ...]

    @property
    def name(self) -> str:
        """The names of the sources."""
        return ", ".join(source.name for source in self.sources)

    def documents(self, counts: ReadingCounts) -> Iterator[str]:
        """Yield what is new in each document; what is repeated is counted."""
        seen: set[bytes | None] = set()
        for source in self.sources:
            for document in source.documents(counts):
                kept, num_repeated, is_new = [], 0, False
                for paragraph in document.split("\n\n"):
                    words = " ".join(paragraph.split()).lower()
                    is_short = len(words) < SHORTEST  # and may be repeated
                    key = None if is_short else hashlib.blake2b(words.encode(), digest_size=16).digest()
                    if key in seen:
                        num_repeated += 1
                        continue
                    kept.append(paragraph)
                    if key is not None:
                        seen.add(key)
                        is_new = True
                if num_repeated:
                    counts.skipped["duplicate paragraphs"] += num_repeated
                if is_new or not num_repeated:
                    yield "\n\n".join(kept)
                else:
                    counts.skipped["documents of duplicate paragraphs"] += 1

    def fingerprint(self) -> str:
        """Digest of the sources' fingerprints."""
        return digest_of("distinct paragraphs", SHORTEST, [source.fingerprint() for source in self.sources])

    def size_bytes(self) -> int | None:
        """Size of all sources; None if one is unknown."""
        return total_size_bytes(self.sources)


def total_size_bytes(sources: Sequence[Source]) -> int | None:
    """Return roughly how much there is to read in all sources; None if one is unknown."""
    sizes = [source.size_bytes() for source in sources]
    return sum(size for size in sizes if size is not None) if None not in sizes else None


def grouped(texts: Iterable[str], characters: int, most: int = sys.maxsize) -> Iterator[list[str]]:
    """Yield lists of consecutive texts of at least so many characters, or of `most` texts; the last may be shorter."""
    held: list[str] = []
    size = 0
    for text in texts:
        held.append(text)
        size += len(text)
        if size >= characters or len(held) >= most:
            yield held
            held, size = [], 0
    if held:
        yield held


def digest_of(*parts: object) -> str:
    """Return a hexadecimal digest of the parts' types and values."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(f"{type(part).__name__}:{part!r};".encode())
    return digest.hexdigest()
