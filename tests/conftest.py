"""What holds for every test: one thread per process, GPU tests only where there is a GPU, and what runs beside what."""

import os
from pathlib import Path
from typing import Any

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


@pytest.hookimpl(optionalhook=True)  # there is no such hook without --numprocesses
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Run the tests of many processes one after another, and all others beside them, file by file.

    A pool of distributed workers fills two cores; two pools on two cores would get in each other's way.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ProcessesFirst(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            folder = nodeid.split("/")[1]
            return folder if folder in {"dist", "slurm"} else nodeid.split("::", maxsplit=1)[0]

    config.option.loadscopereorder = False  # in the order of collection: tests/dist, the longest, begins
    return ProcessesFirst(config, log)
