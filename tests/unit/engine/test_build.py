"""Building an engine: what this machine lacks is reported before anything is built, or printed where it was derived."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.config import get_timers_config, get_wall_clock_breakdown

from raptr_ds.config.load import load_run_config
from raptr_ds.config.run import RunConfig
from raptr_ds.engine import build
from raptr_ds.engine.build import check_device
from raptr_ds.errors import ConfigError, Exit
from raptr_ds.parallel.groups import lone_process_groups


def config_of(*overrides: str) -> RunConfig:
    return load_run_config(Path("deepspeed_configs/bert_quickstart.json"), overrides)


def groups_on(device: str) -> Any:
    return SimpleNamespace(device=torch.device(device), topology=SimpleNamespace(world_size=1))


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "missing_compiler", lambda _device_type: "No working C++ compiler found")


@pytest.mark.usefixtures("no_compiler")
def test_compiling_without_a_compiler_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match=r"compile=true needs a C\+\+ compiler.*No working.*CXX.*to false"):
        build.compilation_of(config_of("raptr_ds.train.compile=true"), groups_on("cpu"))
    assert build.compilation_of(config_of("raptr_ds.train.compile=false"), groups_on("cuda")) == build.Compilation(
        False
    )


@pytest.mark.usefixtures("no_compiler")
def test_a_gpu_without_a_compiler_trains_uncompiled_with_a_warning() -> None:
    found = build.compilation_of(config_of(), groups_on("cuda"))
    assert not found.is_compiled
    assert found.warning == "layers are not compiled, which is slower: No working C++ compiler found"


@pytest.mark.parametrize(
    ("device", "overrides", "is_compiled"),
    [
        ("cuda", ["zero_optimization.stage=2"], True),
        ("cuda", ["zero_optimization.stage=3"], False),
        ("cuda", ["raptr_ds.path.method=width", "raptr_ds.path.schedule=1-2-3-4"], False),
        ("cuda", ["raptr_ds.path.width_schedule=1-2-3-4"], False),
        ("cpu", [], False),
    ],
)
def test_layers_are_compiled_on_gpus_where_they_can_be(
    monkeypatch: pytest.MonkeyPatch, device: str, overrides: list[str], is_compiled: bool
) -> None:
    monkeypatch.setattr(build, "missing_compiler", lambda _device_type: None)
    found = build.compilation_of(config_of(*overrides), groups_on(device))
    assert found == build.Compilation(is_compiled)


def deepspeed_config(on_gpu: bool, *overrides: str, world_size: int = 2) -> dict[str, Any]:
    config = load_run_config(
        Path("deepspeed_configs/bert_quickstart.json"), ["train_micro_batch_size_per_gpu=4", *overrides], world_size
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


# What a GPU lacks is a mistake of the run file

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 0))


PRECISIONS = {
    "bf16": [],
    "fp16": ["bf16.enabled=false", "fp16.enabled=true"],
    "fp32": ["bf16.enabled=false"],
}


def config_in(precision: str) -> RunConfig:
    overrides = ["raptr_ds.model.vocab_size=100", *PRECISIONS[precision]]
    config = load_run_config(Path("deepspeed_configs/bert_base_raptr.json"), overrides, 1)
    assert config.precision == precision
    return config


@pytest.mark.usefixtures("old_gpu")
def test_bf16_on_a_gpu_without_it_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        check_device(config_in("bf16"), GPU)
    assert caught.value.exit_code == Exit.USER_ERROR
    for part in ("bf16.enabled=true", "Tesla V100 has 7.0", "8.0 or higher", "fp16.enabled"):
        assert part in str(caught.value)


@pytest.mark.usefixtures("old_gpu")
@pytest.mark.parametrize(("precision", "device"), [("bf16", CPU), ("fp16", GPU), ("fp32", GPU)])
def test_a_precision_that_the_device_has_is_accepted(precision: str, device: torch.device) -> None:
    check_device(config_in(precision), device)


def test_bf16_on_a_gpu_that_has_it_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    check_device(config_in("bf16"), GPU)


@pytest.mark.usefixtures("old_gpu")
def test_no_engine_is_built_on_a_gpu_without_bf16() -> None:
    with lone_process_groups() as groups, pytest.raises(ConfigError, match="Tesla V100"):
        build.build_engine(config_in("bf16"), replace(groups, device=GPU))


# DeepSpeed's own optimizers are compiled where they are used


class NoCompiler:
    """A builder on a machine without a compiler."""

    def load(self) -> None:
        raise RuntimeError("Error building extension 'fused_adam': g++ ...\nFAILED: cpu_adam_impl.o")


@pytest.mark.parametrize(
    ("kind", "fix"), [("AdamW", "or set optimizer.params.torch_adam"), ("Lion", "type to AdamW and")]
)
def test_an_optimizer_that_cannot_be_compiled_is_a_mistake(
    monkeypatch: pytest.MonkeyPatch, kind: str, fix: str
) -> None:
    monkeypatch.setattr(build, "get_accelerator", lambda: SimpleNamespace(create_op_builder=lambda _name: NoCompiler()))
    build.check_optimizer(config_of())  # torch's
    overrides = [f'optimizer={{"type": "{kind}", "params": {{"lr": 0.1}}}}', "raptr_ds.model.vocab_size=100"]
    with pytest.raises(ConfigError) as caught:
        build.check_optimizer(config_of(*overrides))
    assert f"optimizer.type={kind!r} is DeepSpeed's own" in str(caught.value)
    assert "RuntimeError: Error building extension 'fused_adam': g++ ..." in str(caught.value)
    assert fix in str(caught.value)
    with lone_process_groups() as groups, pytest.raises(ConfigError, match=r"compiled at its first use|runs on GPUs"):
        build.build_engine(config_of(*overrides), groups)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bits_on_a_cpu_without_instructions_for_them_are_a_warning(
    monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    question, cpu = f"_is_mkldnn_{precision}_supported", torch.device("cpu")
    monkeypatch.setattr(torch.ops.mkldnn, question, lambda: False)
    warning = build.precision_warning(precision, cpu)
    assert warning is not None
    assert warning.startswith(f"{precision} is many times slower than fp32 on this CPU")
    assert warning.endswith(f"set {precision}.enabled to false.")
    assert build.precision_warning("fp32", cpu) is None
    assert build.precision_warning(precision, torch.device("cuda")) is None
    monkeypatch.setattr(torch.ops.mkldnn, question, lambda: True)
    assert build.precision_warning(precision, cpu) is None
