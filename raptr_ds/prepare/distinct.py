"""Distinct paragraphs: several sources as one, without what they repeat."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from raptr_ds.prepare.corpus import Source, digest_of
from raptr_ds.prepare.readers import ReadingCounts


@dataclass(frozen=True)
class DistinctParagraphs:
    """Sources as one, without the paragraphs that came before.

    A paragraph stands between blank lines; spaces and case do not make it another. Shorter ones than shortest
    characters (headings, signatures) stay, unless nothing else is left of a document, which is then dropped whole.
    A paragraph held out for validation is so never in the training text too, whatever document repeats it.
    """

    sources: tuple[Source, ...]
    shortest: int = 40

    @property
    def name(self) -> str:
        """The names of the sources."""
        return ", ".join(source.name for source in self.sources)

    def documents(self, counts: ReadingCounts) -> Iterator[str]:
        """Yield what is new in each document; what is not is counted."""
        seen: set[bytes] = set()
        for source in self.sources:
            for document in source.documents(counts):
                kept, num_long, num_dropped = self._kept(document, seen)
                if num_dropped:
                    counts.skipped["duplicate paragraphs"] += num_dropped
                if num_dropped and num_long == num_dropped:
                    counts.skipped["documents of duplicate paragraphs"] += 1
                    continue
                yield "\n\n".join(kept) if num_dropped else document

    def fingerprint(self) -> str:
        """Digest of the sources' fingerprints."""
        return digest_of("distinct paragraphs", self.shortest, [source.fingerprint() for source in self.sources])

    def size_bytes(self) -> int | None:
        """Size of all sources; None if one's is unknown."""
        sizes = [source.size_bytes() for source in self.sources]
        return sum(size for size in sizes if size is not None) if None not in sizes else None

    def _kept(self, document: str, seen: set[bytes]) -> tuple[list[str], int, int]:
        kept, num_long, num_dropped = [], 0, 0
        for paragraph in document.split("\n\n"):
            words = " ".join(paragraph.split()).lower()
            if len(words) >= self.shortest:
                num_long += 1
                key = hashlib.blake2b(words.encode(), digest_size=16).digest()
                if key in seen:
                    num_dropped += 1
                    continue
                seen.add(key)
            kept.append(paragraph)
        return kept, num_long, num_dropped
