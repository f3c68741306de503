"""What travels to a GPU machine without network: which packages it lacks, and whether what is carried is enough.

python -m tests.gpu.kit.carried missing              prints NAME==VERSION of each package to carry
python -m tests.gpu.kit.carried check FOLDER         exit code 1 with the reasons if FOLDER is not enough, or too much
"""

import argparse
import ast
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[3]
ON_DEVICE = Path(__file__).parent / "device_packages.txt"
LIMIT_MIB = 64  # what travels at most, the repository's files included
_MIB = 1 << 20
# Of the device's Python, where it differs from the one that runs this.
_TARGET = {"python_version": "3.12", "python_full_version": "3.12.3", "sys_platform": "linux", "extra": ""}
_BESIDE_TRAINING = ("transformers>=5,<6", "pytest")  # tools/bench.py's other stack, and the tests
# Imported where they are asked for, which is not on a GPU machine.
_OPTIONAL = {"datasets", "lm-eval", "accelerate", "scikit-learn", "evaluate"}


def requirements_of_repository() -> list[Requirement]:
    """Return what the repository needs on a GPU machine: requirements.txt, the comparison's and the tests'."""
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    named = [line.partition("#")[0].strip() for line in lines]
    return [Requirement(line) for line in (*filter(None, named), *_BESIDE_TRAINING)]


def device_packages() -> set[str]:
    """Return the names of the packages that a GPU machine has."""
    lines = ON_DEVICE.read_text().splitlines()
    return {canonicalize_name(line) for line in lines if line and not line.startswith("#")}


def missing_packages(requirements: Iterable[Requirement], on_device: set[str]) -> dict[str, str]:
    """Return name and version of all that is required, directly or not, and not on the device.

    The versions are those of the running environment. Raises: SystemExit if that does not hold what is required.
    """
    found: dict[str, str] = {}
    waiting = list(requirements)
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in on_device or name in found:
            continue
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            raise SystemExit(f"{requirement} is required and not installed here: run make environment") from None
        if not requirement.specifier.contains(installed.version, prereleases=True):
            raise SystemExit(f"{requirement} is required, {installed.version} is installed: run make environment")
        found[name] = installed.version
        waiting += _requirements(installed.requires or [])
    return found


def faults(folder: Path, on_device: set[str], imported: set[str]) -> list[str]:
    """Return what is wrong with a folder's wheels: none, two of one package, or something required that is nowhere.

    imported: the packages that the repository's code imports.
    """
    wheels = sorted((folder / "wheels").glob("*.whl"))
    if not wheels:
        return [f"{folder / 'wheels'} has no wheels"]
    found: list[str] = []
    versions: dict[str, str] = {}
    needs: list[tuple[str, Requirement]] = [("the repository's code", Requirement(name)) for name in sorted(imported)]
    for wheel in wheels:
        name, version, requires = _metadata(wheel)
        if name in versions:
            found.append(f"two wheels of {name}, {versions[name]} and {version}: pip installs neither")
        versions[name] = version
        needs += [(name, requirement) for requirement in _requirements(requires)]
    for by, requirement in needs:
        name = canonicalize_name(requirement.name)
        if name not in versions and name not in on_device:
            found.append(f"{requirement}, needed by {by}, is neither carried nor on the device")
        elif name in versions and not requirement.specifier.contains(versions[name], prereleases=True):
            found.append(f"{requirement}, needed by {by}, is carried as {versions[name]}")
    return found


def imported_packages(folders: Iterable[Path]) -> set[str]:
    """Return the installed packages that the Python files of these folders import, inside functions too."""
    roots: set[str] = set()
    for path in (path for folder in folders for path in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                roots |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                roots.add(node.module.split(".")[0])
    providers = packages_distributions()
    unknown = roots - providers.keys() - set(sys.stdlib_module_names)
    packages = {canonicalize_name(name) for root in roots & providers.keys() for name in providers[root][:1]}
    own = {"raptr-ds", *(path.name for path in REPOSITORY.iterdir())}
    return {name for name in packages | {canonicalize_name(root) for root in unknown} if name not in own | _OPTIONAL}


def travelling_bytes(repository: Path, folder: Path) -> tuple[int, int]:
    """Return the bytes of a repository's files, tracked or not but not ignored, and those of the carried folder."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=repository,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    files = (repository / name for name in listed.split("\0") if name)
    tree = sum(path.lstat().st_size for path in files if path.exists() or path.is_symlink())
    return tree, sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> int:
    """Print what is missing, or check what is carried."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("missing", help="print what is to be carried")
    check = commands.add_parser("check", help="check what is carried")
    check.add_argument("folder", type=Path)
    check.add_argument("--limit-mib", type=float, default=LIMIT_MIB)
    options = parser.parse_args()
    if options.command == "missing":
        for name, version in missing_packages(requirements_of_repository(), device_packages()).items():
            print(f"{name}=={version}")
        return 0
    code = [REPOSITORY / "raptr_ds", REPOSITORY / "tests" / "gpu"]
    found = faults(options.folder, device_packages(), imported_packages(code))
    tree, carried = travelling_bytes(REPOSITORY, options.folder)
    print(f"repository {tree / _MIB:.1f} MiB, carried {carried / _MIB:.1f} MiB, at most {options.limit_mib:g} MiB")
    if tree + carried > options.limit_mib * _MIB:
        found.append(f"{(tree + carried) / _MIB:.1f} MiB are more than travel")
    for fault in found:
        print(f"carried: {fault}", file=sys.stderr)
    return 1 if found else 0


def _requirements(lines: Iterable[str]) -> list[Requirement]:
    """Return those requirements of a package that hold on the device; what is for extras does not."""
    parsed = map(Requirement, lines)
    return [entry for entry in parsed if entry.marker is None or entry.marker.evaluate(_TARGET)]


def _metadata(wheel: Path) -> tuple[str, str, list[str]]:
    """Return a wheel's name, version and requirements."""
    with zipfile.ZipFile(wheel) as archive:
        file = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        message = Parser().parsestr(archive.read(file).decode())
    return canonicalize_name(message["Name"]), message["Version"], message.get_all("Requires-Dist", [])


if __name__ == "__main__":
    sys.exit(main())
