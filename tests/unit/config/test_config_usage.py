"""Keys that only some methods, architectures, stages or other values use; what --set makes of those of the file."""

import json

import pytest

from raptr_ds.config.path_sections import FullSection
from raptr_ds.errors import ConfigError

P, M, R, Z = "raptr_ds.path.", "raptr_ds.model.", "raptr_ds.parallel.", "zero_optimization."
CHECKPOINT, EVAL = "raptr_ds.checkpoint.", "raptr_ds.eval."

UNUSED = {
    "full": [("schedule", "6-12"), ("split", "uniform"), ("paths_per_step", "2"), ("sampling", "uniform")],
    "raptr": [("pld_gamma", "0.1"), ("pld_theta", "0.1"), ("constant_length", "9")],
    "pld": [("schedule", "6-12"), ("fixed_layers", "[0]"), ("constant_length", "9")],
    "constant": [("schedule", "6-12"), ("full_warmup_steps", "3"), ("pld_theta", "0.1"), ("layerdrop", "0.2")],
    "layerdrop": [("schedule", "6-12"), ("fixed_layers", "[0]"), ("sampling", "uniform")],
    "width": [("fixed_layers", "[0]"), ("paths_per_step", "2"), ("growth_warmup_steps", "2")],
    "stacking": [("fixed_layers", "[0]"), ("residual_scale", "sqrt"), ("skipped_update", "zero_grad")],
}


@pytest.mark.parametrize(("method", "key", "value"), [(m, k, v) for m, keys in UNUSED.items() for k, v in keys])
def test_a_key_without_use_is_an_error_with_its_fix(load, method, key, value):
    with pytest.raises(ConfigError, match=rf"{P}{key}=.*has no use with {P}method='{method}'.*Remove it, or set"):
        load(f"{P}method={method}", f"{P}{key}={value}")


@pytest.mark.parametrize(
    "overrides",
    [
        ["raptr_ds.objective.denoisers=ul2"],
        [f"{M}architecture=ul2", "raptr_ds.objective.mask_rate=0.2"],
        [f"{M}rotary_base=500"],
        ["raptr_ds.data.num_workers=0", "raptr_ds.data.prefetch=8"],
        ["zero_optimization.stage=2", "zero_optimization.sub_group_size=1000"],
    ],
)
def test_a_key_of_another_architecture_or_stage_is_an_error(load, overrides):
    with pytest.raises(ConfigError, match="has no use with"):
        load(*overrides)


def test_another_method_from_the_command_line_leaves_keys_of_the_file_out_and_says_so(load, small_run):
    small_run["raptr_ds"]["path"] |= {"schedule": "6-12", "fixed_layers": [0]}
    config = load(f"{P}method=full")
    assert config.path == FullSection()
    assert f"{P}schedule: left out, as {P}method='full' (from --set) does not use it" in config.derived
    assert load(f"{P}method=constant").path.fixed_layers == (0,)
    small_run["raptr_ds"]["path"]["method"] = "full"
    with pytest.raises(ConfigError, match=r"schedule='6-12' \(line \d+\) has no use"):
        load()


def test_an_override_replaces_the_other_way_of_saying_it(load, small_run):
    small_run["raptr_ds"]["path"]["full_warmup_ratio"] = 0.5
    small_run["scheduler"] = {"type": "WarmupLR", "params": {"warmup_ratio": 0.5, "warmup_max_lr": 0.1}}
    config = load(f"{P}full_warmup_steps=4", "scheduler.params.warmup_num_steps=3", "optimizer.params.lr=0.2")
    assert config.path.full_warmup_steps == 4
    assert config.scheduler is not None
    assert config.scheduler["params"]["warmup_num_steps"] == 3
    assert config.scheduler["params"]["warmup_max_lr"] == 0.2
    assert f"{P}full_warmup_ratio: left out, as {P}full_warmup_steps (from --set) replaces it" in config.derived


def test_another_type_from_the_command_line_leaves_parameters_of_the_file_out(load, small_run):
    small_run["optimizer"] = {"type": "AdamW", "params": {"lr": 0.1, "betas": [0.9, 0.95], "torch_adam": True}}
    small_run["scheduler"] = {"type": "WarmupCosineLR", "params": {"warmup_ratio": 0.5, "cos_min_ratio": 0.1}}
    config = load("optimizer.type=SGD", "scheduler.type=WarmupLR")
    assert config.optimizer == {"type": "SGD", "params": {"lr": 0.1}}
    assert config.scheduler is not None
    assert "cos_min_ratio" not in config.scheduler["params"]
    assert "optimizer.params.betas: left out, as optimizer.type='SGD' (from --set) does not use it" in config.derived
    with pytest.raises(ConfigError, match=r"optimizer\.type=SGD: optimizer\.params\.eps"):
        load("optimizer.type=SGD", "optimizer.params.eps=1e-8")


def test_stages_to_balance_over_are_for_balanced_sampling(load, small_run):
    for unused in ([], [f"{P}sampling=bernoulli"]):
        with pytest.raises(ConfigError, match=rf"{P}balance_stages=4.*has no use with {P}sampling=.*'balanced'"):
            load(f"{P}balance_stages=4", *unused)
    small_run["raptr_ds"]["path"] |= {"sampling": "balanced", "balance_stages": 4}
    assert load(f"{P}sampling=uniform").path.balance_stages is None
    config = load(f"{P}method=full")
    assert config.path == FullSection()
    assert any(line.startswith(f"{P}balance_stages: left out") for line in config.derived)


EXPORTED_UL2 = {"model": {"architecture": "ul2"}, "checkpoint": {"interval": 10, "export_interval": 20}}
SWITCHED_OFF = {
    "exports": (
        {"checkpoint": {"interval": 10, "export_interval": 20, "export_precision": "bf16"}},
        f"{CHECKPOINT}export_interval=0",
        [f"{CHECKPOINT}export_precision"],
    ),
    "exports by null": (
        {"checkpoint": {"interval": 10, "export_interval": 20, "export_precision": "bf16"}},
        f"{CHECKPOINT}export_interval=null",
        [f"{CHECKPOINT}export_precision"],
    ),
    "exports by null of the section": (
        {**EXPORTED_UL2, "eval": {"tasks": ["boolq"]}},
        f"{CHECKPOINT[:-1]}=null",
        [f"{EVAL}tasks"],
    ),
    "exports that tasks need": (
        {**EXPORTED_UL2, "eval": {"tasks": ["boolq"], "task_limit": 5}},
        f"{CHECKPOINT}export_interval=0",
        [f"{EVAL}tasks", f"{EVAL}task_limit"],
    ),
    "tasks": (
        {**EXPORTED_UL2, "eval": {"tasks": ["boolq"], "task_interval": 40, "task_device": "cuda"}},
        f"{EVAL}tasks=[]",
        [f"{EVAL}task_interval", f"{EVAL}task_device"],
    ),
    "the architecture of tasks": (
        {**EXPORTED_UL2, "eval": {"tasks": ["boolq"], "task_shots": 2}},
        f"{M}architecture=bert",
        [f"{EVAL}tasks", f"{EVAL}task_shots"],
    ),
    "recomputation": (
        {"parallel": {"activation_checkpointing": True, "keep_activations_up_to": 4}},
        f"{R}activation_checkpointing=false",
        [f"{R}keep_activations_up_to"],
    ),
    "tensor parallelism": (
        {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}},
        f"{R}tensor_model_parallel_size=1",
        [f"{R}sequence_parallel"],
    ),
    "preparing ahead": (
        {"data": {"path": "data/docs", "num_workers": 4, "prefetch": 8}},
        "raptr_ds.data.num_workers=0",
        ["raptr_ds.data.prefetch"],
    ),
    "copies": (
        {"path": {"method": "stacking", "growth_optimizer_state": "copied"}},
        f"{P}growth_init=zero",
        [f"{P}growth_optimizer_state"],
    ),
}


@pytest.mark.parametrize(("sections", "override", "left_out"), SWITCHED_OFF.values(), ids=SWITCHED_OFF.keys())
def test_what_set_switches_off_takes_its_own_keys_with_it(load, small_run, sections, override, left_out):
    for name, keys in sections.items():
        small_run["raptr_ds"][name] = {**small_run["raptr_ds"].get(name, {}), **keys}
    lines = load(override).derived
    assert [line.partition(":")[0] for line in lines if ": left out" in line] == left_out


def test_values_that_change_nothing_need_no_use(load):
    """As a run's own config.json has them: every key, whatever its selector."""
    load(
        f"{CHECKPOINT}export_precision=fp32",
        f"{EVAL}tasks=[]",
        f"{EVAL}task_interval=0",
        f"{EVAL}task_device=cpu",
        f"{R}keep_activations_up_to=0",
        f"{R}sequence_parallel=false",
        "raptr_ds.data.num_workers=0",
        "raptr_ds.data.prefetch=2",
    )
    load(f"{P}method=stacking", f"{P}growth_init=zero", f"{P}growth_optimizer_state=fresh")
    load(f"{P}method=pld", f"{R}micro_batches=[]")


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        (f"{CHECKPOINT}export_interval=often", f"{CHECKPOINT}export_precision=bf16"),
        (f"{M}architecture=brt", "raptr_ds.objective.mask_rate=0.2"),
        (f"{P}sampling=balance", f"{P}balance_stages=4"),
        (f"{Z}stage=4", f"{Z}overlap_comm=true"),
    ],
)
def test_a_wrong_selector_is_the_only_problem(load, wrong, key):
    with pytest.raises(ConfigError, match="must be") as error:
        load(wrong, key)
    assert f"{wrong.partition('=')[0]}=" in str(error.value)
    assert "problems" not in str(error.value)


ZERO_KEYS = {
    "overlap_comm": ("true", "123"),
    "reduce_scatter": ("false", "123"),
    "contiguous_gradients": ("false", "123"),
    "reduce_bucket_size": ("1e6", "123"),
    "round_robin_gradients": ("true", "12"),
    "parameter_alignment": ("true", "12"),
    "use_multi_rank_bucket_allreduce": ("false", "12"),
    "allgather_bucket_size": ("1e6", "12"),
    "sub_group_size": ("1e6", "3"),
}


@pytest.mark.parametrize("stage", "0123")
@pytest.mark.parametrize("key", ZERO_KEYS)
def test_keys_of_zero_are_for_the_stages_that_read_them(load, key, stage):
    value, stages = ZERO_KEYS[key]
    given = [f"{Z}stage={stage}", f"{Z}{key}={value}"]
    if stage in stages:
        assert key in load(*given).zero
    else:
        with pytest.raises(ConfigError, match=rf"{Z}{key}=.*has no use with {Z}stage={stage}: it is for"):
            load(*given)


DYNAMIC_SCALE = {
    "initial_scale_power": ("16", "12"),
    "loss_scale_window": ("1000", "100"),
    "hysteresis": ("2", "1"),
    "consecutive_hysteresis": ("false", "true"),
    "min_loss_scale": ("1", "2"),
}


@pytest.mark.parametrize("key", DYNAMIC_SCALE)
def test_keys_of_a_dynamic_loss_scale_are_for_no_static_one(load, key):
    default, other = (f"fp16.{key}={value}" for value in DYNAMIC_SCALE[key])
    for static in (["fp16.loss_scale=128"], ["fp16.loss_scale=0.5"]):
        with pytest.raises(ConfigError, match=rf"{other} .*has no use with fp16.loss_scale=.*set fp16.loss_scale to 0"):
            load("fp16.enabled=true", *static, other)
        assert key in load("fp16.enabled=true", *static, default).deepspeed["fp16"]
    for dynamic in ([], ["fp16.loss_scale=0"]):
        assert key in load("fp16.enabled=true", *dynamic, other).deepspeed["fp16"]
    with pytest.raises(ConfigError, match=r"fp16.loss_scale=-1 .*must be a number, 0 or more") as error:
        load("fp16.enabled=true", "fp16.loss_scale=-1", other)
    assert "has no use" not in str(error.value)


def test_a_static_loss_scale_of_the_command_line_leaves_the_files_dynamic_one_out(load, small_run):
    small_run["fp16"] = {"enabled": True, "loss_scale_window": 100}
    assert "loss_scale_window" not in load("fp16.loss_scale=128").deepspeed["fp16"]


def test_overlapped_communication_is_for_no_pipeline(load):
    stages, overlap = f"{R}pipeline_model_parallel_size=2", f"{Z}overlap_comm=true"
    with pytest.raises(ConfigError, match=rf"{overlap} .*has no use with {stages}.*engine turns it off"):
        load(f"{Z}stage=1", overlap, stages, world_size=2)
    assert load(f"{Z}stage=1", f"{Z}overlap_comm=false", stages, world_size=2).zero["overlap_comm"] is False
    assert load(f"{Z}stage=1", overlap, world_size=2).zero["overlap_comm"] is True


def test_run_files_made_for_deepspeed_may_hold_its_defaults_at_any_stage(load, small_run):
    small_run["zero_optimization"] = {"stage": 0, "overlap_comm": False, "reduce_scatter": True}
    small_run["zero_optimization"] |= {"contiguous_gradients": True, "allgather_bucket_size": 5e8}
    assert load().zero_stage == 0
    assert load(f"{Z}stage=3").zero_stage == 3


HARMLESS = {
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "zero_optimization.allgather_partitions": True,
    "zero_optimization.load_from_fp32_weights": True,
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": True,
    "zero_optimization.stage3_module_granularity_threshold": 0,
}


def test_what_run_files_made_for_deepspeed_ask_for_in_vain_is_left_out_with_a_line(load):
    config = load(*[f"{key}={json.dumps(value)}" for key, value in HARMLESS.items()])
    assert config.deepspeed == {**load().deepspeed, "zero_optimization": {}}
    lines = [f"{key}={json.dumps(value)}: left out, as it changes nothing here" for key, value in HARMLESS.items()]
    assert sorted(line for line in config.derived if "changes nothing" in line) == sorted(lines)


@pytest.mark.parametrize(
    "asked", ["prescale_gradients=true", "gradient_predivide_factor=2", f"{Z}allgather_partitions=false"]
)
def test_what_they_would_change_is_refused(load, asked):
    with pytest.raises(ConfigError, match=r"is not supported by raptr_ds\. .*Remove it"):
        load(asked)


@pytest.mark.parametrize(
    ("switch", "rest"),
    [("fp16", {"loss_scale": 128}), ("comms_logger", {"verbose": True}), ("flops_profiler", {"profile_step": 4})],
)
def test_what_the_file_switches_off_may_stay_in_it(load, small_run, switch, rest):
    small_run[switch] = {"enabled": False, **rest}
    assert load().precision == "fp32"
    assert load(f"{switch}.enabled=true").deepspeed[switch] == {"enabled": True, **rest}


def test_another_stage_from_the_command_line_leaves_keys_of_the_file_out(load, small_run):
    small_run["zero_optimization"] = {"stage": 2, "overlap_comm": True, "round_robin_gradients": True}
    small_run["communication_data_type"] = "fp32"
    assert load().deepspeed["communication_data_type"] == "fp32"
    assert load(f"{Z}stage=3").zero == {"stage": 3, "overlap_comm": True}
    config = load(f"{Z}stage=0")
    assert (config.zero, "communication_data_type" in config.deepspeed) == ({"stage": 0}, False)
    assert f"{Z}overlap_comm: left out, as {Z}stage=0 (from --set) does not use it" in config.derived


@pytest.mark.parametrize(
    "override", ["scheduler.type=WarmupCosineLR", "scheduler=null", 'scheduler={"type": "WarmupCosineLR"}']
)
def test_the_peak_learning_rate_of_the_file_stays_under_another_schedule(load, small_run, override):
    small_run["scheduler"] = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.002}}
    assert load().optimizer["params"]["lr"] == 0.002
    config = load(override)
    assert config.optimizer == load("optimizer.params.lr=0.002").optimizer
    assert any(line.startswith("optimizer.params.lr=0.002: the file's scheduler.params") for line in config.derived)
    assert load(override, "optimizer.params.lr=0.004").optimizer["params"]["lr"] == 0.004
    assert load("scheduler.params.warmup_max_lr=null").optimizer["params"]["lr"] == 0.001
    small_run["optimizer"] = {"type": "SGD", "params": {"lr": 0.002}}
    assert load(override).optimizer == {"type": "SGD", "params": {"lr": 0.002}}


def test_the_peak_learning_rate_needs_an_optimizer_to_go_to(load, small_run):
    small_run["scheduler"] = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.002}}
    for optimizer in ("AdamW", {"params": 5}):
        small_run["optimizer"] = optimizer
        with pytest.raises(ConfigError, match="must be an object"):
            load("scheduler=null")


def test_dotted_keys_among_parameters_are_reported_under_another_type(load, small_run):
    small_run["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-3, "lr.x": 3}}
    with pytest.raises(ConfigError, match=r"'lr\.x' .* is one key with dots in it"):
        load("optimizer.type=SGD")
