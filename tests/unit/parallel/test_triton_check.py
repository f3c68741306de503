"""A machine on which Triton cannot run: the reason names what is missing. The driver is Triton's own for CUDA."""

import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

from raptr_ds.model.compiler import missing_compiler
from raptr_ds.parallel import cross_entropy, triton_check
from raptr_ds.parallel.triton_check import triton_obstacle


@pytest.fixture(autouse=True)
def pretended_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A GPU, and a driver that nothing has built yet."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(nvidia, "library_dirs", list)
    monkeypatch.setattr(driver, "_default", None)
    monkeypatch.setattr(driver, "_active", None)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    for function in (triton_obstacle, missing_compiler):
        function.cache_clear()
    yield
    for function in (triton_obstacle, missing_compiler):
        function.cache_clear()


def test_a_driver_that_works_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_active", SimpleNamespace(get_current_target=lambda: "cuda:90"))
    assert triton_obstacle() is None


def test_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_check, "find_spec", lambda _name: None)
    assert str(triton_obstacle()).startswith("Triton is not installed")


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    obstacle = str(triton_obstacle())
    assert "apt-get install gcc python3-dev" in obstacle
    assert "Failed to find C compiler" in obstacle


@pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")
def test_no_headers_of_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Then there is a compiler, also for torch's inductor, whose kernels would fail in the first step."""
    paths = sysconfig.get_paths()
    monkeypatch.setattr(sysconfig, "get_paths", lambda *_args, **_more: {**paths, "include": str(tmp_path)})
    assert "apt-get install gcc python3-dev" in str(triton_obstacle())
    assert missing_compiler("cuda") == triton_obstacle()
    assert missing_compiler("cpu") is None


class FakeGroup:
    """A process group of one rank."""

    def size(self) -> int:
        return 1


@pytest.mark.parametrize("obstacle", [None, "no compiler"])
def test_the_cross_entropy_does_without(monkeypatch: pytest.MonkeyPatch, obstacle: str | None) -> None:
    monkeypatch.setattr(cross_entropy, "triton_obstacle", lambda: obstacle)
    on_gpu, alone = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device="cuda"), FakeGroup()
    assert cross_entropy._has_kernel(on_gpu, alone) == (obstacle is None)  # type: ignore[arg-type]
