"""Building an engine: what this machine lacks is reported before anything is built, or printed where it was derived."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raptr_ds.config.load import RunConfig
from raptr_ds.engine import build
from raptr_ds.errors import ConfigError


def config_of(compile_key: bool | None, zero_stage: int = 1, method: str = "raptr") -> Any:
    sections = {"train": SimpleNamespace(compile=compile_key), "path": SimpleNamespace(method=method)}
    config = SimpleNamespace(**sections, zero_stage=zero_stage)
    config.compiles = lambda on_gpu: RunConfig.compiles(config, on_gpu)  # type: ignore[arg-type]
    return config


def groups_on(device: str) -> Any:
    return SimpleNamespace(device=torch.device(device))


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "missing_compiler", lambda _device_type: "No working C++ compiler found")


@pytest.mark.usefixtures("no_compiler")
def test_compiling_without_a_compiler_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match=r"compile=true needs a C\+\+ compiler.*No working.*CXX.*to false"):
        build.compilation_of(config_of(True), groups_on("cpu"))
    assert build.compilation_of(config_of(False), groups_on("cuda")) == build.Compilation(False)


@pytest.mark.usefixtures("no_compiler")
def test_a_gpu_without_a_compiler_trains_uncompiled_with_a_warning() -> None:
    found = build.compilation_of(config_of(None), groups_on("cuda"))
    assert not found.is_compiled
    assert found.warning == "layers are not compiled, which is slower: No working C++ compiler found"


@pytest.mark.parametrize(
    ("device", "zero_stage", "method", "is_compiled"),
    [
        ("cuda", 2, "raptr", True),
        ("cuda", 3, "raptr", False),
        ("cuda", 1, "width", False),
        ("cpu", 1, "raptr", False),
    ],
)
def test_layers_are_compiled_on_gpus_where_they_can_be(
    monkeypatch: pytest.MonkeyPatch, device: str, zero_stage: int, method: str, is_compiled: bool
) -> None:
    monkeypatch.setattr(build, "missing_compiler", lambda _device_type: None)
    found = build.compilation_of(config_of(None, zero_stage, method), groups_on(device))
    assert found == build.Compilation(is_compiled)
