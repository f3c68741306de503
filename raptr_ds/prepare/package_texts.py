"""Files inside packages to documents: one function per format, from a file's name and content to its documents."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from raptr_ds.prepare.corpus import grouped
from raptr_ds.prepare.markup import html_to_text, man_to_text, tidy

GROUP_CHARACTERS = 8_000
_R_STRINGS, _R_CHARACTERS = 16, 9  # types of R's serialization format (R Internals, section 1.8)


def decode(content: bytes) -> str:
    """Decode UTF-8, or else Latin-1, the encoding of old manuals."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def unpacked(name: str, content: bytes) -> bytes:
    """Decompress a file by its name (.gz, and .dz, which dictionaries use for gzip too)."""
    return gzip.decompress(content) if name.endswith((".gz", ".dz")) else content


def html_document(name: str, content: bytes) -> Iterator[str]:
    """Yield an HTML page's prose."""
    yield html_to_text(decode(unpacked(name, content)))


def man_document(name: str, content: bytes) -> Iterator[str]:
    """Yield a manual page's prose."""
    yield man_to_text(decode(unpacked(name, content)))


def vim_document(name: str, content: bytes) -> Iterator[str]:
    """Yield a help file of vim, without the marks of its tags and links."""
    text = decode(unpacked(name, content)).expandtabs(8)
    yield tidy(re.sub(r"\|(\S+?)\|", r"\1", re.sub(r"(?<!\S)\*\S+\*(?!\S)", "", text)))


def summaries(name: str, content: bytes) -> Iterator[str]:
    """Yield title and extract of each article of a JSON object {title: {"title": ..., "extract": ...}}."""
    articles: dict[str, Any] = json.loads(decode(content))
    for title, article in articles.items():
        if extract := str(article.get("extract") or "").strip():
            yield f"{article.get('title') or title}\n\n{extract}"


def labelled_reviews(content: bytes) -> Iterator[tuple[str, int]]:
    """Yield the columns `text`, its HTML line breaks as line ends, and `label` of a CSV file."""
    for row in csv.DictReader(io.StringIO(decode(content), newline="")):
        yield tidy(re.sub(r"\s*(<br\s*/?>\s*)+", "\n\n", row["text"] or "")), int(row["label"])


def reviews(name: str, content: bytes) -> Iterator[str]:
    """Yield the texts of a CSV file of film reviews."""
    yield from (text for text, _ in labelled_reviews(content))


def sword_chapters(name: str, content: bytes) -> Iterator[str]:
    """Yield the chapters of a SWORD module's .czz file: zlib streams of OSIS XML, one after another."""
    while content:
        stream = zlib.decompressobj()
        chapter = decode(stream.decompress(content))
        content = stream.unused_data.lstrip(b"\0")  # the padding between streams
        # Line groups and verses are XML elements that HTML does not know; <hr> too ends a paragraph.
        yield html_to_text(re.sub(r"</?(?:div|p|lg|l|lb|title|verse|list|item)\b[^>]*>", "<hr>", chapter))


def novel_chapters(name: str, content: bytes) -> Iterator[str]:
    """Yield the chapters of novels kept as character vectors in an R package's lazy-load database (.rdb)."""
    while len(content) > 4:
        lines, content = _r_chunk(content)
        text = "\n".join(lines)
        yield from (tidy(part) for part in re.split(r"(?m)^(?=chapter\b)", text, flags=re.IGNORECASE) if part.strip())


def _r_chunk(content: bytes) -> tuple[list[str], bytes]:
    """Return the strings of the first chunk of an .rdb file, and what follows the chunk.

    A chunk is the unpacked length (big-endian, 4 bytes), a letter for the compression unless it is zlib, the stream.
    """
    kind = content[4:5]
    stream: Any = zlib.decompressobj()
    if kind in (b"2", b"Z"):
        stream = bz2.BZ2Decompressor() if kind == b"2" else lzma.LZMADecompressor()
    data = stream.decompress(content[5 if kind in (b"2", b"Z") else 4 :])
    return list(_r_strings(data)), stream.unused_data


def _r_strings(data: bytes) -> Iterator[str]:
    """Yield the strings of a serialized R character vector (XDR, version 2 or 3); nothing for other types."""
    if data[:2] != b"X\n":
        return
    position = 14
    if struct.unpack_from(">i", data, 2)[0] >= 3:  # version 3 names its native encoding first
        position += 4 + struct.unpack_from(">i", data, 14)[0]
    flags, count = struct.unpack_from(">ii", data, position)
    position += 8
    for _ in range(count if flags & 0xFF == _R_STRINGS else 0):
        kind, length = struct.unpack_from(">ii", data, position)
        if kind & 0xFF != _R_CHARACTERS:
            return
        position += 8
        yield decode(data[position : position + max(length, 0)])
        position += max(length, 0)


def dictionary_entries(name: str, content: bytes) -> Iterator[str]:
    """Yield consecutive entries of a dictd dictionary, some thousand characters per document.

    An entry begins at the margin; what is indented belongs to it. Lines that only name their source are left out.
    """
    text = re.sub(r"(?m)^\s*\[[^\]\n]{1,40}\]\s*$", "", decode(unpacked(name, content)))
    entries = re.split(r"\n\s*\n(?=\S)", text)
    texts = (tidy("\n".join(line.strip() for line in entry.splitlines())) for entry in entries)
    yield from _joined(entry for entry in texts if not entry.startswith("00-database"))


def wordnet_glosses(name: str, content: bytes) -> Iterator[str]:
    """Yield consecutive synonym sets of a WordNet file as "words: gloss", some thousand characters per document."""

    def sets() -> Iterator[str]:
        for line in decode(content).splitlines():
            if line[:1] != " " and " | " in line:  # lines that begin with spaces are the licence
                fields, gloss = line.split(" | ", 1)
                parts = fields.split(" ")
                words = parts[4 : 4 + 2 * int(parts[3], 16) : 2]
                yield f"{', '.join(word.replace('_', ' ') for word in words)}: {gloss.strip()}"

    yield from _joined(sets())


def _joined(texts: Iterable[str]) -> Iterator[str]:
    """Join short texts, in order, into documents of some thousand characters."""
    return map("\n\n".join, grouped(filter(None, texts), GROUP_CHARACTERS))
