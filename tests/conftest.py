"""What holds for every test: one thread per process, and GPU tests only where there is a GPU."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: workers share few cores

TESTS = Path(__file__).parent
# Kinds that keep one pool of processes, or one cluster: with xdist (--dist loadgroup), one worker runs all of a kind.
ONE_WORKER = {"dist", "integration", "slurm", "upstream", "gpu"}


@pytest.hookimpl(tryfirst=True)  # xdist reads its mark in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by the folder that they stand in."""
    for item in items:
        kind = item.path.relative_to(TESTS).parts[0]
        if kind in ONE_WORKER:
            item.add_marker(pytest.mark.xdist_group("processes"))
        if kind == "gpu":
            item.add_marker(pytest.mark.gpu)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a GPU test where it cannot run."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU, and torch sees none")
