"""What holds for every test: one thread per process, and GPU tests only where there is a GPU."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: processes share few cores

TESTS = Path(__file__).parent


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark a test by the folder that it stands in."""
    if item.path.relative_to(TESTS).parts[0] == "gpu":
        item.add_marker(pytest.mark.gpu)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a GPU test where it cannot run."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU, and torch sees none")
