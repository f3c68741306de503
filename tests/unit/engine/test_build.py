"""Building an engine: what this machine lacks is told before anything is built."""

from types import SimpleNamespace
from typing import Any

import pytest

from raptr_ds.engine import build
from raptr_ds.errors import ConfigError


def test_compiling_without_a_compiler_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "missing_compiler", lambda: "No working C++ compiler found")
    config: Any = SimpleNamespace(train=SimpleNamespace(compile=True))
    with pytest.raises(ConfigError, match=r"compile=true needs a C\+\+ compiler.*No working.*CXX.*to false"):
        build._check_compiler(config)
    config.train.compile = False
    build._check_compiler(config)
