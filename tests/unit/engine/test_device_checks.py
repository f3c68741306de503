"""What a GPU lacks is a mistake of the run file, with what to set in its place."""

from pathlib import Path

import pytest
import torch

from raptr_ds.config.load import load_run_config
from raptr_ds.engine import build
from raptr_ds.engine.device_checks import GpuFacts, check_gpu
from raptr_ds.errors import ConfigError, Exit
from raptr_ds.parallel.groups import lone_process_groups

RUN_FILE = Path(__file__).parents[3] / "deepspeed_configs" / "bert_base_raptr.json"
OLD, NEW = GpuFacts("Tesla V100", (7, 0), has_bf16=False), GpuFacts("NVIDIA A100", (8, 0), has_bf16=True)
SETTINGS = {
    "bf16": [],
    "fp16": ["bf16.enabled=false", "fp16.enabled=true"],
    "fp32": ["bf16.enabled=false"],
}


def run(precision: str):
    config = load_run_config(RUN_FILE, ["raptr_ds.model.vocab_size=100", *SETTINGS[precision]], 1)
    assert config.precision == precision
    return config


def test_bf16_where_there_is_none():
    with pytest.raises(ConfigError) as caught:
        check_gpu(run("bf16"), OLD)
    assert caught.value.exit_code == Exit.USER_ERROR
    for part in ("bf16.enabled=true", "Tesla V100 has 7.0", "8.0 or higher", "fp16.enabled"):
        assert part in str(caught.value)


@pytest.mark.parametrize(("precision", "gpu"), [("bf16", NEW), ("bf16", None), ("fp16", OLD), ("fp32", OLD)])
def test_what_the_device_has_is_no_mistake(precision, gpu):
    check_gpu(run(precision), gpu)


def test_a_cpu_is_no_gpu():
    assert GpuFacts.of(torch.device("cpu")) is None


def test_an_engine_is_not_built_on_a_gpu_that_lacks_something(monkeypatch):
    monkeypatch.setattr(build.GpuFacts, "of", lambda _device: OLD)
    with lone_process_groups() as groups, pytest.raises(ConfigError, match="Tesla V100"):
        build.build_engine(run("bf16"), groups)
