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

    config.option.loadscopereorder = False  # keep the order below, not the largest groups first
    return Together(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order tests so that neither the end nor a core is left to one of them.

    What takes long comes early: what is marked so, and Slurm's. Tests that mostly wait, for a launcher or a limit of
    time, are spread over those whose ranks compute, as two of a kind at a time leave a core idle, or share it.
    Distributed tests come after the others: what several ranks would compile at once, one process has compiled before.
    """
    items.sort(key=lambda item: ("slurm" not in item.path.parts, item.get_closest_marker("slow") is None))
    places = dict.fromkeys(items, -1.0)
    for folders in ({"slurm", "integration"}, {"dist"}):
        kind = [item for item in items if not folders.isdisjoint(item.path.parts)]
        places.update((item, number / len(kind)) for number, item in enumerate(kind))
    items.sort(key=places.__getitem__)


def together(nodeid: str) -> str:
    """Return a name that a test shares with those that are to run on the same worker.

    A file's tests share fixtures, all of Slurm's a cluster, those of evaluation a model and the list of its tasks, and
    those that compile find what others have compiled. Any other distributed test has processes of its own.
    """
    file = Path(nodeid.split("::", maxsplit=1)[0])
    if file.name == "test_compile.py":
        return "compile"
    if file.parts[1] == "dist":
        return nodeid
    if file.parts[1:3] == ("unit", "evaluation"):
        return "evaluation"
    return "slurm" if file.parts[1] == "slurm" else str(file)
