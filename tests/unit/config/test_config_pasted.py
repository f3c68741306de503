"""What people paste into run files: values beyond limits, other programs' keys and values, schedules beyond sense."""

import json
from typing import Any

import pytest

from raptr_ds.engine.learning_rate import learning_rate_at
from raptr_ds.errors import ConfigError

LIMITS = {
    "1e400": "too large",
    "9" * 400: "too large",
    "-" + "9" * 5000: "too large",
    "[" * 99999 + "]" * 99999: "deep",
    "[" * 30 + "]" * 30: "deep",
    '"\\u0000"': "character",
    '"\\ud800"': "character",
}


@pytest.mark.parametrize("number", range(len(LIMITS)))
@pytest.mark.parametrize("key", ["train_batch_size", "gradient_clipping", "unknown"])
def test_limits_hold_in_the_file_and_in_overrides(load, small_run, key, number):
    value, says = list(LIMITS.items())[number]
    text = json.dumps({key: "HERE", **{k: v for k, v in small_run.items() if k != key}}, indent=1)
    text = text.replace('"HERE"', value)
    with pytest.raises(ConfigError, match=says) as error:
        load(text=text)
    assert "run.json" in str(error.value)
    if says != "deep":
        assert f"line 2: {key}" in str(error.value)
    for override in (f"{key}={value}", f"{key}=[{value}]", f'optimizer={{"params": {{"{key}": {value}}}}}'):
        with pytest.raises(ConfigError, match=f"--set .*{says}"):
            load(override)


@pytest.mark.parametrize("key", ["steps", "seed", "max_non_finite_steps"])
def test_whole_numbers_may_be_written_as_floats_but_not_as_booleans_or_strings(load, key):
    assert getattr(load(f"raptr_ds.train.{key}=40.0").train, key) == 40
    for wrong in ("true", '"40"', "40.5", "NaN", "-Infinity"):
        with pytest.raises(ConfigError, match=f"{key}=.*must be a whole number"):
            load(f"raptr_ds.train.{key}={wrong}")


def test_a_key_twice_in_an_override(load):
    with pytest.raises(ConfigError, match="--set bf16: the key 'enabled' is written twice"):
        load("bf16={enabled: true, enabled: false}")


AUTO = ["train_batch_size", "gradient_clipping", "bf16.enabled", "zero_optimization.reduce_bucket_size", "fp16"]
AUTO += ["raptr_ds.train.steps", "raptr_ds.model.hidden_dropout", "raptr_ds.parallel.tensor_model_parallel_size"]
AUTO += ["optimizer.type", "optimizer.params.lr", "scheduler.type", "optimizer.params.betas"]


@pytest.mark.parametrize("key", AUTO)
def test_auto_is_hugging_faces(load, key):
    type_of = ["optimizer.type=AdamW"] if key.startswith("optimizer.params") else []
    with pytest.raises(
        ConfigError, match=rf"{key}='auto' \(from --set\) is a value that Hugging Face's Trainer .*Write"
    ):
        load(*type_of, f"{key}=auto")


def one_problem(load, tree: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        load(tree=tree)
    assert "problems" not in str(error.value)
    return str(error.value)


def test_dotted_keys_of_a_file(load, small_run):
    del small_run["raptr_ds"]["train"]
    message = one_problem(load, {**small_run, "raptr_ds.train.steps": 5})
    assert 'write "raptr_ds": {"train": {"steps": ...}}' in message
    assert "line" in message
    small_run["raptr_ds"]["train.steps"] = 5
    assert 'write "train": {"steps": ...}' in one_problem(load, small_run)


def test_a_wrong_name_is_not_missing_as_well(load, small_run):
    block = small_run["raptr_ds"]
    model = block["model"]
    for key, wrong in (("num_layers", "num_layer"), ("num_layers", "num_hidden_layers"), ("seq_length", "seq_len")):
        block["model"] = {wrong if name == key else name: value for name, value in model.items()}
        assert wrong in one_problem(load, small_run)
    del block["model"]
    assert "modle" in one_problem(load, {**small_run, "raptr_ds": {**block, "modle": model}})
    assert "raptr_ds.model" in one_problem(load, {**small_run, "model": model})
    assert "raptr-ds" in one_problem(load, {"train_batch_size": 8, "raptr-ds": {**block, "model": model}})


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("micro_batch_size", "train_micro_batch_size_per_gpu"),
        ("lr_decay_style", "scheduler.type"),
        ("train_iters", "raptr_ds.train.steps"),
        ("learning_rate", "optimizer.params.lr"),
    ],
)
def test_names_of_other_programs(load, key, ours):
    with pytest.raises(ConfigError, match=f"{key} .*Its name here is {ours}"):
        load(f"{key}=1")


@pytest.mark.parametrize("mean_span", [1e-320, 0.5])
def test_a_span_is_at_least_a_token(load, small_run, mean_span):
    denoiser = {"name": "a", "kind": "span", "rate": 0.1, "mean_span": mean_span}
    small_run["raptr_ds"]["model"]["architecture"] = "ul2"
    small_run["raptr_ds"]["objective"] = {"denoisers": [denoiser]}
    assert f"mean_span={mean_span!r}" in (message := one_problem(load, small_run))
    assert "must be greater than or equal to 1" in message
    denoiser["mean_span"] = 1
    load()


def test_the_advice_on_mask_rates_can_be_followed(load):
    for length in (2, 3, 7, 32):
        with pytest.raises(ConfigError, match="less than one position") as error:
            load(f"raptr_ds.model.seq_length={length}", "raptr_ds.objective.mask_rate=0.01")
        rate = str(error.value).rpartition("mask_rate to ")[2].split()[0]
        load(f"raptr_ds.model.seq_length={length}", f"raptr_ds.objective.mask_rate={rate}")
    with pytest.raises(ConfigError, match=r"Set seq_length to 7 or more\.$"):
        load("raptr_ds.model.seq_length=1")
    with pytest.raises(ConfigError, match=r"Set mask_rate to 0\.0313 or more\.$"):
        load("raptr_ds.objective.mask_rate=5e-324")
    with pytest.raises(ConfigError, match=r"Set both to more\.$"):
        load("raptr_ds.model.seq_length=1", "raptr_ds.objective.mask_rate=5e-324")


def test_no_batches_switch_evaluation_off(load):
    assert not load("raptr_ds.eval.batches=0", "raptr_ds.eval.interval=5").eval.due(5)


def scheduled(load, kind: str, **params: Any):
    return load("scheduler=" + json.dumps({"type": kind, "params": params}), "raptr_ds.train.steps=6")


@pytest.mark.parametrize(
    ("kind", "params", "says"),
    [
        ("WarmupDecayLR", {"total_num_steps": 3}, "last 3 steps would have the learning rate 0.*set it to 6"),
        ("WarmupCosineLR", {"total_num_steps": 3}, "raise scheduler.params.cos_min_ratio"),
        ("WarmupStableDecayLR", {"total_num_steps": 3}, "raise scheduler.params.decay_min_lr"),
        ("WarmupStableDecayLR", {"decay_min_lr": 1}, "decay_min_lr=1 must be at most the peak"),
        ("WarmupLR", {"warmup_ratio": 1}, "warmup_ratio=1 .*must be a fraction"),
        ("WarmupLR", {"warmup_num_steps": 6}, "warmup_num_steps=6 must be less than"),
        ("WarmupStableDecayLR", {"warmup_ratio": 0.7, "decay_ratio": 0.5}, "warmup_ratio=0.7 \\+ decay_ratio=0.5"),
        ("WarmupLR", {"warmup_max_lr": 0}, "warmup_max_lr=0"),
    ],
)
def test_schedules_beyond_sense(load, kind, params, says):
    with pytest.raises(ConfigError, match=says):
        scheduled(load, kind, **params)


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("WarmupCosineLR", {"total_num_steps": 3, "cos_min_ratio": 0.1}),
        ("WarmupStableDecayLR", {"total_num_steps": 3, "decay_min_lr": 1e-4}),
        ("WarmupDecayLR", {"total_num_steps": 60}),
    ],
)
def test_unusual_schedules_have_a_warning(load, kind, params):
    (line,) = scheduled(load, kind, **params).warnings
    assert f"total_num_steps={params['total_num_steps']}" in line


@pytest.mark.parametrize(
    ("overrides", "phases"),
    [
        ("schedule=6-12 split=[0.999,0.001]", "12"),
        ("split=power:50", "6 or 8 or 10"),
        ("schedule=6-12 full_warmup_steps=99", "12"),
        ("method=width schedule=2-4 split=[0.999,0.001]", "4"),
    ],
)
def test_phases_without_steps_have_a_warning(load, overrides, phases):
    (line,) = load(*[f"raptr_ds.path.{override}" for override in overrides.split()]).warnings
    assert f"steps none is in the phase of {phases}. Train for more steps" in line
    assert load("raptr_ds.train.steps=4").warnings == []


@pytest.mark.parametrize("num_steps", [1, 2, 100])
def test_a_warm_up_by_a_ratio_leaves_a_step_for_the_schedule(load, num_steps):
    path = load(f"raptr_ds.train.steps={num_steps}", "raptr_ds.path.full_warmup_ratio=0.996").path
    assert path.full_warmup_steps == num_steps - 1


def test_a_ratio_below_one_leaves_a_step_of_training(load):
    config = scheduled(load, "WarmupLR", warmup_ratio=0.99, warmup_type="linear")
    rates = [learning_rate_at(config.scheduler, 1e-3, step) for step in range(6)]
    assert rates == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3, 1e-3])
