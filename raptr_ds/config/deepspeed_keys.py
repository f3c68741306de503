"""The table of DeepSpeed's keys: which a run file may use, with which values, and what to write instead of the others.

Names and ranges are those of DeepSpeed 0.19.8: runtime/config.py, runtime/constants.py, runtime/precision_config.py,
runtime/zero/config.py, runtime/zero/offload_config.py, comm/constants.py, profiling/constants.py and
runtime/swap_tensor/constants.py.
"""

from collections.abc import Callable
from typing import Any

Check = Callable[[Any], str | None]
"""Returns what a value must be, or None if it is that."""


def flag(value: Any) -> str | None:
    """Accept true and false."""
    return None if isinstance(value, bool) else "must be true or false"


def text(value: Any) -> str | None:
    """Accept a string."""
    return None if isinstance(value, str) else "must be a string"


def texts(value: Any) -> str | None:
    """Accept a list of strings."""
    fits = isinstance(value, list) and all(isinstance(item, str) for item in value)
    return None if fits else "must be a list of strings"


def whole(least: int, most: int | None = None) -> Check:
    """Make a check for integers; DeepSpeed writes some as 5e8, which is taken."""

    def check(value: Any) -> str | None:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and float(value).is_integer()
        if fits and value >= least and (most is None or value <= most):
            return None
        return f"must be a whole number, {least} or more" if most is None else f"must be {least}..{most}, whole"

    return check


def number(least: float, most: float = float("inf"), *, above: bool = False) -> Check:
    """Make a check for numbers, `above` excluding the lower bound."""

    def check(value: Any) -> str | None:
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        if numeric and (least < value if above else least <= value) and value <= most and value != float("inf"):
            return None
        lower = f"greater than {least:g}" if above else f"{least:g} or more"
        return f"must be a number, {lower}" + ("" if most == float("inf") else f" and at most {most:g}")

    return check


def choice(*values: str) -> Check:
    """Make a check for one of some strings."""

    def check(value: Any) -> str | None:
        return None if isinstance(value, str) and value in values else f"must be one of {', '.join(values)}"

    return check


Table = dict[str, "Check | Table"]

STAGE_3_ONLY: Table = {
    "sub_group_size": whole(0),
    "stage3_prefetch_bucket_size": whole(0),
    "stage3_param_persistence_threshold": whole(0),
    "stage3_model_persistence_threshold": whole(0),
    "stage3_max_live_parameters": whole(0),
    "stage3_max_reuse_distance": whole(0),
    "stage3_gather_16bit_weights_on_model_save": flag,
    "stage3_module_granularity_threshold": whole(0),
    "stage3_use_all_reduce_for_fetch_params": flag,
    "stage3_allgather_sequential": flag,
    "memory_efficient_linear": flag,
    "log_trace_cache_warnings": flag,
    "enable_sanity_checks": flag,
}

ZERO: Table = {
    "stage": whole(0, 3),
    "contiguous_gradients": flag,
    "reduce_scatter": flag,
    "reduce_bucket_size": whole(1),
    "use_multi_rank_bucket_allreduce": flag,
    "allgather_partitions": flag,
    "allgather_bucket_size": whole(0),
    "overlap_comm": flag,
    "load_from_fp32_weights": flag,
    "round_robin_gradients": flag,
    "parameter_alignment": flag,
    "override_module_apply": flag,
    **STAGE_3_ONLY,
}

KNOWN: Table = {
    "train_batch_size": whole(1),
    "train_micro_batch_size_per_gpu": whole(1),
    "gradient_accumulation_steps": whole(1),
    "optimizer": {"type": text, "params": {}},
    "scheduler": {"type": text, "params": {}},
    "gradient_clipping": number(0),
    "bf16": {
        "enabled": flag,
    },
    "fp16": {
        "enabled": flag,
        "loss_scale": number(0),
        "initial_scale_power": whole(0, 32),
        "loss_scale_window": whole(1),
        "hysteresis": whole(1),
        "consecutive_hysteresis": flag,
        "min_loss_scale": whole(1),
    },
    "zero_optimization": ZERO,
    "zero_allow_untested_optimizer": flag,
    "zero_force_ds_cpu_optimizer": flag,
    "communication_data_type": choice("fp16", "bf16", "fp32"),
    "prescale_gradients": flag,
    "gradient_predivide_factor": number(0, above=True),
    "data_types": {"grad_accum_dtype": choice("fp32", "bf16", "fp16")},
    "aio": {
        "block_size": whole(1),
        "queue_depth": whole(1),
        "intra_op_parallelism": whole(1),
        "single_submit": flag,
        "overlap_events": flag,
        "use_gds": flag,
    },
    "steps_per_print": whole(1),
    "wall_clock_breakdown": flag,
    "memory_breakdown": flag,
    "dump_state": flag,
    "disable_python_gc": flag,
    "log_level": text,
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

_METRICS = "the run writes metrics.jsonl and, with raptr_ds.log.tensorboard, TensorBoard events. Remove it"
_REMOVED = "was removed from DeepSpeed"
_NO_OFFLOAD = "is not offered: offloaded gradients bypass the norm that every layout shares"
_NEEDS_OFFLOAD = "is not offered: DeepSpeed has it with offloading only"
_UNTESTED = "is not offered: it has not been tested with layers that are skipped"

REFUSED: dict[str, str] = {
    "progressive_layer_drop": f"{_REMOVED}. Write raptr_ds.path.method='pld' with raptr_ds.path.pld_theta and "
    "raptr_ds.path.pld_gamma",
    "elasticity": f"{_REMOVED}. Write train_batch_size and train_micro_batch_size_per_gpu",
    "curriculum_learning": f"{_REMOVED}. Remove it; raptr_ds.path.schedule is what grows during a run",
    "amp": f"{_REMOVED}. Write bf16.enabled=true or fp16.enabled=true",
    "nebula": f"{_REMOVED}. Checkpoints are set in raptr_ds.checkpoint",
    "compression_training": f"{_REMOVED}. Remove it",
    "quantize_training": f"{_REMOVED}. Remove it",
    "sparse_gradients": f"{_REMOVED}. Remove it",
    "eigenvalue": f"{_REMOVED}. Remove it",
    "sparse_attention": f"{_REMOVED}. Remove it",
    "graph_harvesting": f"{_REMOVED}. Remove it",
    "bfloat16": "is an old name. Write bf16",
    "tensorboard": f"is not used: {_METRICS}",
    "wandb": f"is not used: {_METRICS}",
    "csv_monitor": f"is not used: {_METRICS}",
    "comet": f"is not used: {_METRICS}",
    "activation_checkpointing": "is not used. Write raptr_ds.parallel.activation_checkpointing=true, which recomputes "
    "each layer on the step's own path",
    "pipeline": "is not used. Write raptr_ds.parallel.pipeline_model_parallel_size and, for uneven stages, "
    "raptr_ds.parallel.pipeline_layers",
    "tensor_parallel": "is not used. Write raptr_ds.parallel.tensor_model_parallel_size",
    "sequence_parallel_size": "is not offered. Write raptr_ds.parallel.tensor_model_parallel_size",
    "seq_parallel_communication_data_type": "is not used without sequence parallelism. Remove it",
    "expert_parallel": "is not offered: the models have no experts. Remove it",
    "use_data_before_expert_parallelism": "is not offered: the models have no experts. Remove it",
    "hybrid_engine": "is for generation during training, which is not done. Remove it",
    "weight_quantization": "is for inference. Remove it",
    "compile": "is not used: it would compile the whole step, whose layers change. Write raptr_ds.train.compile=true, "
    "which compiles each layer",
    "autotuning": "is not offered. Remove it; tools/bench.py measures a step",
    "data_efficiency": "is not used: batches are a function of seed and step. Remove it",
    "dataloader_drop_last": "is not used: batches are a function of seed and step. Remove it",
    "checkpoint": "is not used. Write raptr_ds.checkpoint.interval, keep and load",
    "datastates_ckpt": "is not used. Write raptr_ds.checkpoint.interval, keep and load",
    "torch_autocast": "is not offered. Write bf16.enabled=true or fp16.enabled=true",
    "gradient_allreduce_op": "is fixed: gradients are means over the global batch. Remove it",
    "managed_gradient_accumulation": "is not used: the engine takes a whole step at once. Remove it",
    "disable_allgather": "is not used by DeepSpeed's ZeRO any more. Remove it",
    "vocabulary_size": "is not used. Write raptr_ds.model.vocab_size, or nothing: the tokenizer's is taken",
    "fp16.auto_cast": "is not used: the model's inputs are token ids. Remove it",
    "data_types.param_dtype": "is not used. Write bf16.enabled=true or fp16.enabled=true",
    "data_types.buffer_dtype": "is not used: the model keeps its buffers in fp32. Remove it",
    "data_types.keep_in_fp32_modules": "is not used. Remove it",
    "optimizer.legacy_fusion": "is not used by the optimizers that are offered. Remove it",
    "optimizer.params.max_grad_norm": "is not an optimizer's parameter. Write gradient_clipping",
    "bf16.check_grad_overflow": "is fixed: a step that is not finite is skipped on all ranks. Remove it",
    "bf16.immediate_grad_update": "is for an optimizer that cannot skip layers. Remove it",
    "bf16.bf16_master_weights_and_grads": f"{_NEEDS_OFFLOAD}. Remove it",
    "bf16.bf16_optimizer_states": f"{_NEEDS_OFFLOAD}. Remove it",
    "fp16.fp16_master_weights_and_grads": f"{_NEEDS_OFFLOAD}. Remove it",
    "zero_optimization.cpu_offload": f"{_REMOVED}, and offloading is not offered. Remove it",
    "zero_optimization.cpu_offload_param": f"{_REMOVED}, and offloading is not offered. Remove it",
    "zero_optimization.cpu_offload_use_pin_memory": f"{_REMOVED}, and offloading is not offered. Remove it",
    "zero_optimization.offload_optimizer": f"{_NO_OFFLOAD}. Remove it; stage 3, pipeline stages and "
    "raptr_ds.parallel.activation_checkpointing save memory",
    "zero_optimization.offload_param": f"{_NO_OFFLOAD}. Remove it; stage 3 shards the parameters",
    "zero_optimization.zero_hpz_partition_size": f"{_UNTESTED}. Remove it",
    "zero_optimization.zero_quantized_weights": f"{_UNTESTED}. Remove it",
    "zero_optimization.zero_quantized_nontrainable_weights": f"{_UNTESTED}. Remove it",
    "zero_optimization.zero_quantized_gradients": f"{_UNTESTED}. Remove it",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "is an old name. Write "
    "stage3_gather_16bit_weights_on_model_save",
    "zero_optimization.compute_grad_norm": "is fixed: the gradient norm is in every line of metrics. Remove it",
    "zero_optimization.ignore_unused_parameters": "is fixed: skipped layers have no gradients. Remove it",
    "zero_optimization.elastic_checkpoint": "is not used. Remove it",
    "zero_optimization.legacy_stage1": "is not used. Remove it",
    "zero_optimization.zenflow": "is not offered: it defers updates across steps, whose paths differ. Remove it",
    "zero_optimization.leaf_module": "is set by the engine. Remove it",
    "zero_optimization.pipeline_loading_checkpoint": "is not used. Remove it",
    "zero_optimization.save_muon_momentum_buffer_in_memory": "is for Muon, which is not offered. Remove it",
    "zero_optimization.mics_shard_size": f"{_REMOVED}. Remove it",
    "zero_optimization.mics_hierarchical_params_gather": f"{_REMOVED}. Remove it",
    "zero_optimization.zeropp_loco_param": f"{_REMOVED}. Remove it",
}
