"""What holds for every test: one thread per process, no GPU but for `make test-gpu`, how many inputs Hypothesis tries,
and what runs together.
"""

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# By hand: HYPOTHESIS_PROFILE=long pytest FILE
settings.register_profile("ci", max_examples=50, deadline=None, derandomize=True)
settings.register_profile("long", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: processes share few cores
if os.environ.get("KIT_DEVICE") != "cuda":  # which `make test-gpu` sets
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # several processes compute as one would: NCCL refuses two on one GPU
    os.environ["TRITON_INTERPRET"] = "1"  # its kernels run on CPU tensors, slowly (tests/interpreted.py)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep what shares something on one of pytest-xdist's workers.

    Its own `--dist loadgroup` (3.8.0) has no effect under pytest 9.2, which no longer reads the `_nodeid` it writes.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return together(nodeid)

    return Together(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with what takes long, so that none of it is left when a worker has nothing else to do.

    What several ranks would compile at once one process has compiled before, where it is the same.
    """
    items.sort(key=lambda item: (item.get_closest_marker("slow") is None, "dist" in item.path.parts))


def together(nodeid: str) -> str:
    """Return a name that a test shares with those that are to run on the same worker.

    A file's tests share fixtures, all of Slurm's a cluster, and those that compile find what others have compiled. Any
    other distributed test has processes of its own.
    """
    file = Path(nodeid.split("::", maxsplit=1)[0])
    if file.name == "test_compile.py":
        return "compile"
    if file.parts[1] == "dist":
        return nodeid
    return "slurm" if file.parts[1] == "slurm" else str(file)
