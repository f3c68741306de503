"""One cluster for the whole folder: two logical nodes, emptied after each test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.lab import SlurmLab, why_unavailable
from tests.slurm.stand_in import Job


@pytest.fixture(scope="session")
def _cluster() -> Iterator[SlurmLab]:
    reason = why_unavailable()
    if reason is not None:
        pytest.skip(reason)
    with SlurmLab(nodes=2) as lab:
        yield lab


@pytest.fixture
def lab(_cluster: SlurmLab) -> Iterator[SlurmLab]:
    """A cluster with both nodes free."""
    yield _cluster
    _cluster.clear()


@pytest.fixture
def job(lab: SlurmLab, tmp_path: Path) -> Job:
    """A stand-in repository in a folder of its own."""
    return Job(tmp_path, lab)
