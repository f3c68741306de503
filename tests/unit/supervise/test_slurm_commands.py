"""Slurm's commands, by stand-ins."""

import os
from pathlib import Path

import pytest

from raptr_ds.supervise.slurm_commands import sbatch


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment that sbatch gets, a variable a line."""
    (tmp_path / "sbatch").write_text(
        f"#!/bin/bash\nexport -p | sed 's/^declare -x //' >{tmp_path}/seen\necho '9;mine'\n"
    )
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path / "seen"


def test_a_job_that_submits_another_hands_on_nothing_of_its_own(seen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm would: the new job would take itself for a part of that array, and for its fifth start."""
    of_the_job = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "5"}
    of_the_job |= {"SLURM_CPUS_PER_TASK": "12", "SLURM_NTASKS_PER_NODE": "8", "SLURM_GPUS_ON_NODE": "8"}
    of_the_user = {"SLURM_CONF": "/etc/mine.conf", "SLURM_WAIT": "90", "RAPTR_RETRY_DELAY": "5"}
    for name, value in {"SLURM_JOB_ID": "10", **of_the_job, **of_the_user}.items():
        monkeypatch.setenv(name, value)
    assert sbatch(["sbatch", "file"], "", os.environ) == "9"
    lines = seen.read_text().splitlines()
    assert {f'{name}="{value}"' for name, value in of_the_user.items()} <= set(lines)
    assert not [line for line in lines if line.partition("=")[0] in of_the_job]
    monkeypatch.delenv("SLURM_JOB_ID")  # what is set outside a job is the user's own
    sbatch(["sbatch", "file"], "", os.environ)
    assert 'SLURM_CPUS_PER_TASK="12"' in seen.read_text()
