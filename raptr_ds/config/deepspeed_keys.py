"""The DeepSpeed keys that a run file may use, with their values, and what to use instead of others that people try.

Names and ranges are those of DeepSpeed 0.19.8: runtime/config.py, runtime/constants.py, runtime/precision_config.py,
runtime/zero/config.py, comm/constants.py and profiling/constants.py.
"""

from collections.abc import Callable
from math import inf
from typing import Any

from raptr_ds.config.section_types import MOST_COUNT

DEFAULT_REDUCE_BUCKET = 500_000_000
"""DeepSpeed's reduce_bucket_size, in elements."""

DEFAULT_KEPT_PARAMETERS = 1_000_000_000
"""DeepSpeed's stage3_max_reuse_distance and stage3_max_live_parameters, in elements."""

Check = Callable[[Any], str | None]
"""Returns what a value must be, or None if it is that."""


def must(be: str, fits: Callable[[Any], bool]) -> Check:
    """Make a check for what `fits`; be: what that is."""
    return lambda value: None if fits(value) else f"must be {be}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


flag = must("true or false", lambda value: isinstance(value, bool))
text = must("a string", lambda value: isinstance(value, str))
texts = must("a list of strings", lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value))


def choice(*values: str) -> Check:
    """Make a check for one of some strings."""
    return must(f"one of {', '.join(values)}", lambda value: isinstance(value, str) and value in values)


def whole(least: int, most: float = inf) -> Check:
    """Make a check for integers, which may be written as floats: 5e8."""
    be = f"a whole number, {least} " + ("or more" if most == inf else f"to {most}")
    return must(be, lambda value: _is_number(value) and value % 1 == 0 and least <= value <= most)


def number(least: float, most: float = inf, *, above: bool = False) -> Check:
    """Make a check for finite numbers; above: `least` itself is excluded."""
    be = f"a number, greater than {least:g}" if above else f"a number, {least:g} or more"

    def fits(value: Any) -> bool:
        return _is_number(value) and least <= value <= most and value != inf and not (above and value == least)

    return must(be if most == inf else f"{be} and at most {most:g}", fits)


Table = dict[str, "Check | Table"]

STAGE_3_ONLY: Table = {
    "sub_group_size": whole(0),
    "stage3_prefetch_bucket_size": whole(0),
    "stage3_param_persistence_threshold": whole(0),
    "stage3_model_persistence_threshold": whole(0),
    "stage3_max_live_parameters": whole(0),
    "stage3_max_reuse_distance": whole(0),
    "stage3_use_all_reduce_for_fetch_params": flag,
    "stage3_allgather_sequential": flag,
    "memory_efficient_linear": flag,
    "log_trace_cache_warnings": flag,
    "enable_sanity_checks": flag,
}

STAGES_1_AND_2: Table = {
    "use_multi_rank_bucket_allreduce": flag,
    "allgather_bucket_size": must("an even number, 2 or more", lambda value: whole(2)(value) is None and not value % 2),
    "round_robin_gradients": flag,
    "parameter_alignment": flag,
}

PARTITIONED: Table = {
    "contiguous_gradients": flag,
    "reduce_scatter": flag,
    "reduce_bucket_size": whole(1),
    "overlap_comm": flag,
}
"""Keys of stages 1 to 3."""

zero_stage, loss_scale = whole(0, 3), number(0)
ZERO: Table = {"stage": zero_stage, **PARTITIONED, **STAGES_1_AND_2, **STAGE_3_ONLY}

ZERO_DEFAULTS: dict[str, bool | int] = {
    "use_multi_rank_bucket_allreduce": True,
    "allgather_bucket_size": DEFAULT_REDUCE_BUCKET,
    "round_robin_gradients": False,
    "parameter_alignment": False,
    "contiguous_gradients": True,
    "reduce_scatter": True,
    "reduce_bucket_size": DEFAULT_REDUCE_BUCKET,
    "overlap_comm": False,
}
"""DeepSpeed's defaults, which run files made for it hold at any stage."""

FP16_DEFAULTS: dict[str, bool | int] = {
    "initial_scale_power": 16,
    "loss_scale_window": 1000,
    "hysteresis": 2,
    "consecutive_hysteresis": False,
    "min_loss_scale": 1,
}
"""DeepSpeed's defaults of a dynamic loss scale, which run files made for it hold beside a static one."""

KNOWN: Table = {
    "train_batch_size": whole(1, MOST_COUNT),
    "train_micro_batch_size_per_gpu": whole(1, MOST_COUNT),
    "gradient_accumulation_steps": whole(1, MOST_COUNT),
    "optimizer": {"type": text, "params": {}},
    "scheduler": {"type": text, "params": {}},
    "gradient_clipping": number(0),
    "bf16": {
        "enabled": flag,
    },
    "fp16": {
        "enabled": flag,
        "loss_scale": loss_scale,
        "initial_scale_power": whole(0, 32),
        "loss_scale_window": whole(1),
        "hysteresis": whole(1, 1000),
        "consecutive_hysteresis": flag,
        "min_loss_scale": whole(1),
    },
    "zero_optimization": ZERO,
    "communication_data_type": choice("fp16", "bf16", "fp32"),
    "data_types": {"grad_accum_dtype": choice("fp32", "bf16", "fp16")},
    "steps_per_print": whole(1),
    "wall_clock_breakdown": flag,
    "memory_breakdown": flag,
    "dump_state": flag,
    "disable_python_gc": flag,
    "log_level": choice("debug", "info", "warning", "error", "critical"),
    "comms_logger": {"enabled": flag, "verbose": flag, "prof_all": flag, "debug": flag, "prof_ops": texts},
    "timers": {"throughput": {"enabled": flag, "synchronized": flag}},
    "flops_profiler": {
        "enabled": flag,
        "recompute_fwd_factor": number(0),
        "profile_step": whole(1),
        "module_depth": whole(-1),
        "top_modules": whole(1),
        "detailed": flag,
        "output_file": text,
    },
}

OFF_BY_DEFAULT = frozenset({"bf16", "fp16", "comms_logger", "flops_profiler"})
"""Objects of which nothing is used until `enabled` is true, which it is not by default."""

_METRICS = "Remove it: a run writes metrics.jsonl and, with raptr_ds.log.tensorboard=true, TensorBoard events"
_PRECISION = "Use bf16.enabled=true or fp16.enabled=true"
_BATCHES = "Remove it: batches are a function of seed and step"
_OFFLOAD = (
    "Offloaded gradients would be missing from the norm that all layouts share. Remove it; stage 3, pipeline stages "
    "and raptr_ds.parallel.activation_checkpointing save memory"
)
_UNTESTED = "Remove it: it has not been tested with layers that are skipped"
_SCALED = (
    "DeepSpeed's ZeRO ignores it or refuses it while reduce_scatter is on, and stage 0 reduces without it. Remove it: "
    "gradients are divided by the number of data-parallel processes"
)
_TENSOR = "Use raptr_ds.parallel.tensor_model_parallel_size"

INSTEAD: dict[str, str] = {
    "aio": "Remove it: it is for offloading, which is not supported",
    "activation_checkpointing": "Use raptr_ds.parallel.activation_checkpointing=true, which recomputes the layers of "
    "each step's own path",
    "amp": _PRECISION,
    "autotuning": "Remove it: tools/bench.py measures a step",
    "bfloat16": "It is an old name: use bf16",
    "checkpoint": "Use raptr_ds.checkpoint",
    "comet": _METRICS,
    "compile": "It would compile the whole step, whose layers change. Use raptr_ds.train.compile=true, which compiles "
    "each layer",
    "compression_training": _UNTESTED,
    "csv_monitor": _METRICS,
    "curriculum_learning": f"{_BATCHES}; raptr_ds.path.schedule is what grows during a run",
    "data_efficiency": _BATCHES,
    "elasticity": "Use train_batch_size and train_micro_batch_size_per_gpu",
    "gradient_predivide_factor": _SCALED,
    "pipeline": "Use raptr_ds.parallel.pipeline_model_parallel_size and, for uneven stages, "
    "raptr_ds.parallel.pipeline_layers",
    "prescale_gradients": _SCALED,
    "progressive_layer_drop": "Use raptr_ds.path.method='pld' with raptr_ds.path.pld_theta and raptr_ds.path.pld_gamma",
    "sequence_parallel_size": f"{_TENSOR} and raptr_ds.parallel.sequence_parallel",
    "sparse_attention": "Remove it: attention is dense",
    "tensor_parallel": _TENSOR,
    "tensorboard": _METRICS,
    "torch_autocast": _PRECISION,
    "vocabulary_size": "Use raptr_ds.model.vocab_size, or leave it to the tokenizer",
    "wandb": "Use raptr_ds.log.wandb, an object with project, name, entity, group and mode",
    "zero_allow_untested_optimizer": "Remove it: every optimizer.type of raptr_ds works at every ZeRO stage",
    "zero_force_ds_cpu_optimizer": "Remove it: it is for offloading, which is not supported",
    "optimizer.params.fp32_optimizer_states": "Remove it: it is for offloading, and optimizer states are fp32 here",
    "optimizer.params.max_grad_norm": "Use gradient_clipping",
    "raptr_ds.parallel.grow_micro_batch": "It is replaced by raptr_ds.parallel.micro_batches, which has the size for "
    "each phase. Remove it; where it is true, add the line that `python tools/plan.py FILE --processes N "
    "--micro-batches` then prints",
    "zero_optimization.allgather_partitions": "DeepSpeed does not read it. Remove it",
    "zero_optimization.cpu_offload": _OFFLOAD,
    "zero_optimization.load_from_fp32_weights": "Remove it: it is for DeepSpeed's checkpoints, and raptr_ds has its "
    "own, which hold fp32 weights",
    "zero_optimization.offload_optimizer": _OFFLOAD,
    "zero_optimization.offload_param": _OFFLOAD,
    "zero_optimization.override_module_apply": "Remove it: it is for models that are built inside deepspeed.zero.Init",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "Remove it: checkpoints are raptr_ds's own, and "
    "tools/export_hf.py writes whole weights",
    "zero_optimization.stage3_module_granularity_threshold": "It fetches several modules as one, those that a "
    "step skips too, and the backward pass then fails. Remove it",
    "zero_optimization.zero_hpz_partition_size": _UNTESTED,
    "zero_optimization.zero_quantized_gradients": _UNTESTED,
    "zero_optimization.zero_quantized_weights": _UNTESTED,
}
"""What to use instead of keys that people try or that earlier versions had, or why there is nothing."""

HARMLESS: dict[str, tuple[Any, ...]] = {
    "gradient_predivide_factor": (1, 1.0),
    "prescale_gradients": (False,),
    "zero_allow_untested_optimizer": (False, True),
    "zero_force_ds_cpu_optimizer": (False, True),
    "optimizer.params.fp32_optimizer_states": (True,),
    "zero_optimization.allgather_partitions": (True,),
    "zero_optimization.load_from_fp32_weights": (True,),
    "zero_optimization.override_module_apply": (True,),
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": (False, True),
    "zero_optimization.stage3_module_granularity_threshold": (0,),
}
"""Values of such keys that ask for nothing else than what happens anyway; run files made for DeepSpeed hold them."""

_STEPS, _RATE, _SCHEDULE = "raptr_ds.train.steps", "optimizer.params.lr", "scheduler.params"
_FILES = "raptr_ds.data.path, a folder made by tools/prepare_data.py"

ELSEWHERE_NAMES: dict[str, str] = {
    **dict.fromkeys(("micro_batch_size", "per_device_train_batch_size"), "train_micro_batch_size_per_gpu"),
    "global_batch_size": "train_batch_size",
    **dict.fromkeys(("train_iters", "max_steps", "train_steps", "num_train_steps"), _STEPS),
    **dict.fromkeys(("lr", "learning_rate", "max_lr"), _RATE),
    **{name: f"optimizer.params.{name}" for name in ("weight_decay", "betas", "eps")},
    **dict.fromkeys(("adam_beta1", "adam_beta2"), "optimizer.params.betas"),
    **dict.fromkeys(("adam_eps", "adam_epsilon"), "optimizer.params.eps"),
    **dict.fromkeys(("lr_decay_style", "lr_scheduler_type", "lr_scheduler"), "scheduler.type"),
    **dict.fromkeys(("lr_decay_iters", "lr_decay_steps"), f"{_SCHEDULE}.total_num_steps"),
    **dict.fromkeys(("lr_warmup_iters", "lr_warmup_steps", "warmup_steps"), f"{_SCHEDULE}.warmup_num_steps"),
    **dict.fromkeys(("lr_warmup_fraction", "warmup_fraction", "warmup_ratio"), f"{_SCHEDULE}.warmup_ratio"),
    "lr_warmup_init": f"{_SCHEDULE}.warmup_min_lr",
    "min_lr": f"{_SCHEDULE}.cos_min_ratio of scheduler.type WarmupCosineLR (a fraction of the peak), or "
    f"{_SCHEDULE}.decay_min_lr of WarmupStableDecayLR",
    **dict.fromkeys(("clip_grad", "max_grad_norm"), "gradient_clipping"),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "n_layer"), "raptr_ds.model.num_layers"),
    **dict.fromkeys(("n_heads", "n_head"), "raptr_ds.model.num_attention_heads"),
    **dict.fromkeys(("d_model", "n_embd"), "raptr_ds.model.hidden_size"),
    **dict.fromkeys(("max_position_embeddings", "max_seq_length", "sequence_length"), "raptr_ds.model.seq_length"),
    **dict.fromkeys(("intermediate_size", "d_ff"), "raptr_ds.model.ffn_hidden_size"),
    **dict.fromkeys(("hidden_act", "activation_function"), "raptr_ds.model.activation"),
    **dict.fromkeys(("hidden_dropout_prob", "dropout"), "raptr_ds.model.hidden_dropout"),
    "attention_probs_dropout_prob": "raptr_ds.model.attention_dropout",
    "initializer_range": "raptr_ds.model.init_method_std",
    "layer_norm_eps": "raptr_ds.model.norm_epsilon",
    **dict.fromkeys(("mlm_probability", "mask_prob"), "raptr_ds.objective.mask_rate"),
    "tokenizer_model": "raptr_ds.data.tokenizer",
    **dict.fromkeys(("data_path", "train_file", "dataset_name"), _FILES),
    **dict.fromkeys(("output_dir", "save_dir"), "raptr_ds.train.save"),
    **dict.fromkeys(("eval_interval", "eval_steps"), "raptr_ds.eval.interval"),
    "eval_iters": "raptr_ds.eval.batches",
    **dict.fromkeys(("save_interval", "save_steps"), "raptr_ds.checkpoint.interval"),
    "save_total_limit": "raptr_ds.checkpoint.keep",
    **dict.fromkeys(("log_interval", "logging_steps"), "raptr_ds.log.interval"),
    **dict.fromkeys(("recompute_granularity", "gradient_checkpointing"), "raptr_ds.parallel.activation_checkpointing"),
    "zero_stage": "zero_optimization.stage",
}
"""Names of Megatron's and Hugging Face's arguments, and the run file's for the same thing."""
