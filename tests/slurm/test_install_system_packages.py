"""tools/install_system_packages.sh with stand-ins for apt-get and for the commands that packages bring."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "install_system_packages.sh"
PACKAGES = "slurmctld slurmd slurm-client munge openmpi-bin chromium chromium-driver"
COMMANDS = ("slurmctld", "slurmd", "srun", "munged", "mpirun", "chromium", "chromedriver")


class Machine:
    """A PATH with a few programs of its own, and a record of what apt-get was asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for program in ("bash", "env"):
            (folder / program).symlink_to(f"/usr/bin/{program}")
        self.program("id", "echo 0")

    def program(self, name: str, body: str = ":") -> None:
        """Add a program."""
        (self.folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (self.folder / name).chmod(0o755)

    def install(self) -> subprocess.CompletedProcess[str]:
        """Run the script, without the places where this machine's own daemons lie."""
        text = SCRIPT.read_text()
        places = "PATH=$PATH:/usr/sbin:/sbin"
        assert places in text
        return subprocess.run(
            ["/bin/bash", "-c", text.replace(places, ""), str(SCRIPT)],
            env=os.environ | {"PATH": str(self.folder)},
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )

    def asked(self) -> list[str]:
        """Return apt-get's command lines."""
        record = self.folder / "asked"
        return record.read_text().splitlines() if record.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine of root's with none of the packages."""
    return Machine(tmp_path)


def test_with_everything_here_it_asks_apt_nothing(machine: Machine) -> None:
    machine.program("apt-get", f"echo $* >>{machine.folder}/asked")
    for command in COMMANDS:
        machine.program(command)
    result = machine.install()
    assert (result.returncode, machine.asked()) == (0, [])
    assert "nothing to do" in result.stdout


def test_without_apt_it_says_so_and_ends_well(machine: Machine) -> None:
    result = machine.install()
    assert result.returncode == 0
    assert f"no apt on this system, so not installed: {PACKAGES}" in result.stdout


def test_only_what_is_missing_is_installed(machine: Machine) -> None:
    machine.program("apt-get", f"echo $* >>{machine.folder}/asked")
    for command in ("slurmctld", "slurmd", "munged"):
        machine.program(command)
    assert machine.install().returncode == 0
    assert machine.asked() == ["install -y --no-install-recommends slurm-client openmpi-bin chromium chromium-driver"]


def test_an_old_list_of_packages_is_refreshed(machine: Machine) -> None:
    record = machine.folder / "asked"
    machine.program("apt-get", f'echo $* >>{record}\n[[ "$(<{record})" == *update* ]]')
    assert machine.install().returncode == 0
    assert [line.split()[0] for line in machine.asked()] == ["install", "update", "install"]


def test_a_failing_apt_is_a_failure(machine: Machine) -> None:
    machine.program("apt-get", "echo offline >&2\nexit 100")
    result = machine.install()
    assert result.returncode == 1
    assert "offline" in result.stderr
    assert f"could not install {PACKAGES}" in result.stderr


@pytest.mark.parametrize("sudo_works", [False, True])
def test_users_need_sudo_without_a_password(machine: Machine, sudo_works: bool) -> None:
    machine.program("id", "echo 1000")
    machine.program("apt-get", f"echo $* >>{machine.folder}/asked")
    machine.program("sudo", 'shift\n"$@"' if sudo_works else "exit 1")
    if sudo_works:
        machine.program("true")
    result = machine.install()
    assert result.returncode == 0
    assert machine.asked() == ([f"install -y --no-install-recommends {PACKAGES}"] if sudo_works else [])
    assert ("neither root nor sudo" in result.stdout) != sudo_works
