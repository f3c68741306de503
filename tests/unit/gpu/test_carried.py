"""What is carried to a GPU machine without network: enough, not too much, and fetched once."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.gpu.kit.carried import (
    REPOSITORY,
    device_packages,
    faults,
    imported_packages,
    missing_packages,
    requirements_of_repository,
)


def wheel(folder: Path, name: str, version: str, *requires: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requires]
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines) + "\n")


def test_what_is_carried_must_be_enough(tmp_path: Path) -> None:
    assert "has no wheels" in faults(tmp_path, set(), set())[0]
    wheels = tmp_path / "wheels"
    wheel(wheels, "deepspeed", "0.19.8", "hjson", "torch", "sphinx; extra == 'dev'", "tomli; python_version < '3.11'")
    assert faults(tmp_path, {"torch"}, {"deepspeed", "torch"}) == [
        "hjson, needed by deepspeed, is neither carried nor on the device"
    ]
    wheel(wheels, "hjson", "3.1.0")
    assert faults(tmp_path, {"torch"}, {"deepspeed", "torch"}) == []
    wheel(wheels, "pydantic", "2.0", "pydantic-core==2.1")
    wheel(wheels, "pydantic_core", "2.2")
    assert faults(tmp_path, {"torch"}, {"rich"}) == [
        "rich, needed by the repository's code, is neither carried nor on the device",
        "pydantic-core==2.1, needed by pydantic, is carried as 2.2",
    ]
    wheel(wheels, "hjson", "3.0.0")
    assert "two wheels of hjson" in faults(tmp_path, {"torch", "rich"}, set())[0]


def test_what_is_missing_follows_from_the_requirements() -> None:
    """The pins and their needs, without what a GPU machine has; an environment that is behind is an error."""
    found = missing_packages(requirements_of_repository(), device_packages())
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", (REPOSITORY / "requirements.txt").read_text(), re.M))
    assert {name: found[name] for name in ("deepspeed", "megatron-core")} == {
        name: pins[name] for name in ("deepspeed", "megatron-core")
    }
    assert {"pydantic", "pydantic-core", "typing-inspection"} <= found.keys()
    assert not found.keys() & {"torch", "numpy", "typing-extensions"}
    with pytest.raises(SystemExit, match="make environment"):
        missing_packages([Requirement("pydantic<1")], set())


def test_every_import_of_the_library_is_on_the_device_or_carried() -> None:
    imported = imported_packages([REPOSITORY / "raptr_ds", REPOSITORY / "tests" / "gpu"])
    assert {"torch", "deepspeed", "megatron-core", "pydantic", "pytest"} <= imported
    carried = missing_packages(requirements_of_repository(), device_packages())
    assert imported <= device_packages() | carried.keys()


def test_too_much_to_carry_is_refused(tmp_path: Path) -> None:
    wheel(tmp_path / "wheels", "hjson", "3.1.0")
    command = [sys.executable, "-m", "tests.gpu.kit.carried", "check", str(tmp_path), "--limit-mib", "0.1"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "MiB are more than travel" in done.stderr


# In place of .venv/bin/python: one package is missing, whose wheel pip downloads, and the check comes to CHECK.
PYTHON = """#!/usr/bin/env bash
echo "$*" >>calls
case "$*" in
    *"carried missing") echo typing-inspection==0.4.5 ;;
    *"pip download"*) touch .gpu/wheels/typing_inspection-0.4.5-py3-none-any.whl ;;
    *"carried check .gpu") exit $(cat check) ;;
esac
"""


def test_preparing_fetches_what_is_missing_once_and_writes_the_command(tmp_path: Path) -> None:
    kit, python = tmp_path / "tests" / "gpu" / "kit", tmp_path / ".venv" / "bin" / "python"
    kit.mkdir(parents=True)
    python.parent.mkdir(parents=True)
    shutil.copy(REPOSITORY / "tests" / "gpu" / "kit" / "prepare.sh", kit)
    (kit / "on_device.sh").write_text('echo "ran with $*"\n')
    python.write_text(PYTHON)
    python.chmod(0o755)
    old = tmp_path / ".gpu" / "wheels" / "typing_inspection-0.4.4-py3-none-any.whl"
    old.parent.mkdir(parents=True)
    old.touch()

    def prepare(check: int) -> str:
        (tmp_path / "check").write_text(str(check))
        (tmp_path / "calls").unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", str(kit / "prepare.sh")], capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == check, done.stderr
        return (tmp_path / "calls").read_text()

    calls = prepare(0)
    assert re.search(r"pip download .*--no-deps .*--python-version 3.12 .* typing-inspection==0.4.5$", calls, re.M)
    assert "tools/prepare_data.py --embedded --output .gpu/data/docs" in calls
    assert [path.name for path in old.parent.iterdir()] == ["typing_inspection-0.4.5-py3-none-any.whl"]
    assert "pip download" not in prepare(1)  # and the check's exit code is the script's
    stub = ["bash", str(tmp_path / ".gpu" / "on_device.sh"), "runs", "compare"]
    assert subprocess.run(stub, capture_output=True, text=True, check=True).stdout == "ran with runs compare\n"
