"""Building an engine: what this machine lacks is told before anything is built."""

from pathlib import Path as FilePath
from types import SimpleNamespace
from typing import Any

import pytest
from deepspeed.runtime.config import get_timers_config, get_wall_clock_breakdown

from raptr_ds.config.load import load_run_config
from raptr_ds.engine import build
from raptr_ds.errors import ConfigError


def test_compiling_without_a_compiler_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "missing_compiler", lambda: "No working C++ compiler found")
    config: Any = SimpleNamespace(train=SimpleNamespace(compile=True))
    with pytest.raises(ConfigError, match=r"compile=true needs a C\+\+ compiler.*No working.*CXX.*to false"):
        build._check_compiler(config)
    config.train.compile = False
    build._check_compiler(config)


def deepspeed_config(on_gpu: bool, *overrides: str, world_size: int = 2) -> dict[str, Any]:
    config = load_run_config(
        FilePath("deepspeed_configs/bert_quickstart.json"), ["train_micro_batch_size_per_gpu=4", *overrides], world_size
    )
    return build._deepspeed_config(config, on_gpu)


@pytest.mark.parametrize(("override", "is_on"), [("", False), ("timers.throughput.enabled=true", True)])
def test_deepspeeds_timers_wait_for_no_device_unless_asked(override: str, is_on: bool) -> None:
    config = deepspeed_config(False, *([override] if override else []))
    assert get_timers_config(config).enabled == is_on
    assert not get_wall_clock_breakdown(config)


@pytest.mark.parametrize(
    ("overrides", "overlaps"),
    [
        (["zero_optimization.stage=1"], True),
        (["zero_optimization.stage=2"], True),
        (["zero_optimization.stage=0"], False),
        (["zero_optimization.stage=3"], True),
        (["zero_optimization.stage=2", "zero_optimization.overlap_comm=false"], False),
        (["zero_optimization.stage=1", "raptr_ds.path.paths_per_step=2"], False),
        (["zero_optimization.stage=1", "raptr_ds.parallel.pipeline_model_parallel_size=2"], False),
    ],
)
def test_gradients_are_reduced_during_the_backward_pass_on_gpus(overrides: list[str], overlaps: bool) -> None:
    assert deepspeed_config(True, *overrides, world_size=4)["zero_optimization"]["overlap_comm"] is overlaps


def test_a_lone_gpu_has_nothing_to_overlap() -> None:
    config = deepspeed_config(True, "zero_optimization.stage=1", world_size=1)
    assert config["zero_optimization"]["overlap_comm"] is False


def test_a_cpu_overlaps_where_the_run_file_says_so_only() -> None:
    assert "overlap_comm" not in deepspeed_config(False, "zero_optimization.stage=2").get("zero_optimization", {})
