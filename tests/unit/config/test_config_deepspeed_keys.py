"""The tables of DeepSpeed's keys against the installed DeepSpeed's own sources, read as text, and their messages."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from raptr_ds.config.deepspeed_keys import FP16_DEFAULTS, INSTEAD, KNOWN, ZERO, ZERO_DEFAULTS
from raptr_ds.config.optimization import NOT_OFFERED, OPTIMIZERS, SCHEDULERS
from raptr_ds.errors import ConfigError


@pytest.fixture(scope="module")
def source() -> Path:
    found = importlib.util.find_spec("deepspeed")
    if found is None or found.origin is None:
        pytest.skip("deepspeed is not installed: its sources are the oracle of this test")
    return Path(found.origin).parent


def fields(file: Path, cls: str) -> set[str]:
    """Return the names a pydantic class reads from a file: aliases where it has them."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls)
    names = set()
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            alias = re.search(r"alias='(\w+)'", ast.unparse(node.value)) if node.value else None
            names.add(alias.group(1) if alias else node.target.id)
    assert names
    return names


@pytest.mark.parametrize(
    ("file", "cls", "table"),
    [
        ("runtime/zero/config.py", "DeepSpeedZeroConfig", ZERO),
        ("runtime/precision_config.py", "DeepSpeedBF16Config", KNOWN["bf16"]),
        ("runtime/precision_config.py", "DeepSpeedFP16Config", KNOWN["fp16"]),
    ],
)
def test_every_supported_key_of_a_block_is_deepspeeds(source, file, cls, table):
    assert set(table) - fields(source / file, cls) == set()


def test_every_optimizer_is_accepted_or_refused_with_a_reason(source):
    text = (source / "runtime/config.py").read_text(encoding="utf-8")
    theirs = set(re.findall(r"^[A-Z]+_OPTIMIZER = '(\w+)'", text, re.M))
    assert theirs >= {"adam", "muon"}
    assert theirs - {name.lower() for name in OPTIMIZERS} - set(NOT_OFFERED) == set()


def test_our_parameters_of_deepspeed_schedulers_are_theirs(source):
    tree = ast.parse((source / "runtime/lr_schedules.py").read_text(encoding="utf-8"))
    for name in ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR"):
        cls = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
        init = next(node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
        theirs = {argument.arg for argument in init.args.args} - {"self", "optimizer", "last_batch_iteration"}
        assert set(SCHEDULERS[name]) == theirs | {"warmup_ratio"}


@pytest.mark.parametrize("key", sorted(INSTEAD))
def test_keys_that_people_try_are_refused_with_what_to_do(load, key):
    with pytest.raises(ConfigError) as error:
        load(f"{key}={{}}", "optimizer.type=AdamW")
    assert f"{key} (from --set) is not supported by raptr_ds. {INSTEAD[key]}." in str(error.value)
    assert re.search(r"\b(use|remove)\b", INSTEAD[key], re.IGNORECASE)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "nebula={}",
            "nebula (from --set) is not supported by raptr_ds. Correct or remove it. Keys there: train_batch",
        ),
        ("optimzer={}", "optimzer (from --set) is not supported by raptr_ds; did you mean 'optimizer'?"),
        (
            "zero_optimization.leaf_module={}",
            "zero_optimization.leaf_module (from --set) is not supported by raptr_ds. Correct or remove it. "
            "Keys of zero_optimization: stage, ",
        ),
        ("data_types.param_dtype=fp16", "Keys of data_types: grad_accum_dtype."),
        (
            "zero_optimization.stage3_prefetch_bucket=5e8",
            "did you mean 'stage3_prefetch_bucket_size'?",
        ),
    ],
)
def test_other_keys_are_refused_with_those_that_are_supported(load, override, says):
    with pytest.raises(ConfigError) as error:
        load(override)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("zero_optimization.stage=4", "zero_optimization.stage=4 (from --set) must be a whole number, 0 to 3"),
        ("zero_optimization=true", "must be an object"),
        ("train_batch_size=0", "train_batch_size=0 (from --set) must be a whole number, 1 to 2147483647"),
        ("train_batch_size=8.5", "must be a whole number"),
        ('train_batch_size="8"', "must be a whole number"),
        ("gradient_clipping=-1", "must be a number, 0 or more"),
        ("bf16.enabled=1", "must be true or false"),
        ("bf16=yes", "must be an object"),
        ("fp16.loss_scale_window=0", "must be a whole number, 1 or more"),
        ("fp16.min_loss_scale=-1", "must be a whole number, 1 or more"),
        ("fp16.hysteresis=1001", "must be a whole number, 1 to 1000"),
        ("fp16.loss_scale=128", "fp16={'loss_scale': 128} (from --set) has no use without fp16.enabled"),
        ("comms_logger.verbose=true", "Set comms_logger.enabled to true, or to false to keep the rest for later"),
        ("flops_profiler={profile_step: 4}", "has no use without flops_profiler.enabled"),
        ("log_level=loud", "must be one of debug, info, warning, error, critical"),
        ("zero_optimization.offload_optimizer.device=cpu", "Offloaded gradients would be missing from the norm"),
        ("zero_optimization.zero_quantized_weights=true", "has not been tested"),
        (
            "optimizer.type=AdmaW",
            "optimizer.type='AdmaW' (from --set) is not supported by raptr_ds; did you mean 'AdamW'?",
        ),
        ("optimizer.type=Lamb", "is not supported by raptr_ds: it updates whole matrices"),
        ('optimizer={"type": "AdamW", "params": {"betas": [1, 2]}}', "optimizer.params.betas=[1, 2]"),
        ('optimizer={"type": "AdamW", "params": {"lr": 0}}', "must be a number, greater than 0"),
        (
            'optimizer={"type": "SGD", "params": {"betas": [0, 0]}}',
            "optimizer.type=SGD: optimizer.params.betas",
        ),
        ('optimizer={"type": "AdamW", "params": {"foreach": true}}', "no use with torch_adam not set"),
        (
            'optimizer={"type": "AdamW", "params": {"amsgrad": true}}',
            "optimizer.params.amsgrad (from --set) has no use with torch_adam not set: it is a parameter of torch's",
        ),
        (
            'optimizer={"type": "Adam", "params": {"torch_adam": true, "bias_correction": true}}',
            "no use with torch_adam true",
        ),
        (
            'optimizer={"params": {"foreach": true, "fused": true}}',
            "choose two implementations of torch's Adam. Set one",
        ),
        ("zero_optimization={stage: 2, allgather_bucket_size: 3}", "must be an even number, 2 or more"),
        ("zero_optimization={stage: 1, allgather_bucket_size: 0}", "must be an even number, 2 or more"),
        ("optimizer=5", "optimizer=5 (from --set) must be an object"),
        ('optimizer={"type": "AdamW", "params": 5}', "optimizer.params=5"),
        ("scheduler.type=OneCycle", "It must be one of WarmupLR, "),
        ('scheduler={"type": "WarmupLR", "params": {"warmup_ratio": 0.1, "warmup_num_steps": 3}}', "twice. Keep one"),
        ('scheduler={"type": "WarmupLR", "params": {"total_num_steps": 5}}', "scheduler.params.total_num_steps"),
        ('scheduler={"type": "WarmupLR", "params": {"warmup_type": "cubic"}}', "must be one of log, linear"),
    ],
)
def test_values_out_of_range(load, override, says):
    with pytest.raises(ConfigError) as error:
        load(override)
    assert says in str(error.value)


def test_the_type_of_communication_is_deepspeeds(load):
    with pytest.raises(ConfigError, match="must be one of fp16, bf16, fp32"):
        load("communication_data_type=int8", "zero_optimization.stage=1")


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error", "critical"])
def test_every_level_of_logging_is_deepspeeds(load, source, level):
    load(f"log_level={level}")
    assert f'"{level}": logging.' in (source / "utils/logging.py").read_text(encoding="utf-8")


def defaults_of(file, name):
    """Return the defaults of a class's fields, as they are written."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    cls = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    return {
        node.target.id: ast.unparse(node.value)
        for node in cls.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value
    }


def test_the_defaults_of_fp16_are_deepspeeds(source):
    theirs = defaults_of(source / "runtime/precision_config.py", "DeepSpeedFP16Config")
    assert {key: theirs[key] for key in FP16_DEFAULTS} == {key: str(value) for key, value in FP16_DEFAULTS.items()}


def test_the_defaults_of_zero_are_deepspeeds(source):
    theirs = defaults_of(source / "runtime/zero/config.py", "DeepSpeedZeroConfig")
    assert theirs["overlap_comm"] == "None"  # false at all stages but 3
    for key, default in ZERO_DEFAULTS.items():
        written = "False" if key == "overlap_comm" else theirs[key]
        assert written.startswith("Field(pp_int(500000000.0)") if default == 5e8 else written == str(default), key
