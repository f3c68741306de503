"""From a run's configuration to what a plan of it needs: layout, device, and predicted positions."""

from collections.abc import Mapping
from typing import Any

from raptr_ds.config.deepspeed_keys import DEFAULT_KEPT_PARAMETERS, DEFAULT_REDUCE_BUCKET
from raptr_ds.config.derive import derive_overlap
from raptr_ds.config.path_sections import WarmedUpSection
from raptr_ds.config.run import RunConfig
from raptr_ds.data.loader import predictions_per_sequence
from raptr_ds.paths.cost import layer_parameters
from raptr_ds.planner.memory import largest_micro_batch
from raptr_ds.planner.step_time import Device, Layout, Setting
from raptr_ds.runtime.method import micro_batches_of, path_method_of


def layout_of(config: RunConfig, on_gpu: bool) -> Layout:
    """Return how the run's steps are spread out and computed, on GPUs or on CPUs."""
    recompute = config.parallel.activation_checkpointing
    layer = layer_parameters(config.model) / config.parallel.tensor_model_parallel_size
    accumulated = str(config.deepspeed.get("data_types", {}).get("grad_accum_dtype", config.precision))
    summed = config.deepspeed.get("communication_data_type", accumulated)  # as in engine/deepspeed_engine.py
    zero = config.deepspeed.get("zero_optimization", {})
    momentum = 4 if config.optimizer["params"].get("momentum") else 0
    return Layout(
        stage_layers=config.parallel.pipeline_layers,
        micro_batch=config.batch.micro_batch,
        num_micro_batches=config.batch.accumulation,
        tensor=config.parallel.tensor_model_parallel_size,
        sequence_parallel=config.parallel.sequence_parallel,
        data=config.batch.data_parallel,
        # Stages 1 and 2 are left out where there is nobody to share with (engine/deepspeed_engine.py).
        zero_stage=config.zero_stage if config.batch.data_parallel > 1 or config.zero_stage == 3 else 0,
        recompute=recompute,
        bytes_per_value=4 if config.precision == "fp32" else 2,
        gradient_bytes_per_value=4 if accumulated == "fp32" else 2,
        summed_bytes_per_value=4 if summed == "fp32" else 2,
        kept_whole=kept_whole(zero, layer, recompute),
        optimizer_bytes={"Lion": 4, "SGD": momentum}.get(config.optimizer["type"], 8),
        reduce_bucket=int(zero.get("reduce_bucket_size", DEFAULT_REDUCE_BUCKET)),
        reduce_buffers=reduce_buffers_of(config, on_gpu, config.zero_stage, config.batch.data_parallel),
        compiled=config.compiles(on_gpu),
    )


def kept_whole(zero_optimization: Mapping[str, Any], layer: float, recompute: bool) -> float:
    """Return the most parameters that ZeRO 3 keeps whole between a micro batch's forward and backward pass.

    layer: parameters of one layer on a rank. DeepSpeed has two limits, and the looser one counts. A weight is kept if
    at most stage3_max_reuse_distance elements are used before its next use; those of the layers after it are used twice
    until then, or three times with recomputation. Prefetching, unless it is off, passes over weights that are whole
    until it reaches the backward pass, and keeps them too: only stage3_max_live_parameters limits it, which also counts
    what is in use, about an MLP. Exact to half a layer, as whole matrices are freed. (Where nothing is kept,
    recomputation gathers a third time, which the cost model does not count.)
    Source: runtime/zero/partitioned_param_coordinator.py of deepspeed 0.19.8; counted in tests/dist.
    """
    reuse = int(zero_optimization.get("stage3_max_reuse_distance", DEFAULT_KEPT_PARAMETERS)) / (3 if recompute else 2)
    if int(zero_optimization.get("stage3_prefetch_bucket_size", 1)) == 0:
        return reuse
    return max(reuse, int(zero_optimization.get("stage3_max_live_parameters", DEFAULT_KEPT_PARAMETERS)) - layer * 2 / 3)


def scheduled_lengths(config: RunConfig) -> list[int]:
    """Return the path length of each phase of the schedule, a full-model warm-up left out."""
    phases = path_method_of(config).phases
    path = config.path
    scheduled = phases[1:] if isinstance(path, WarmedUpSection) and path.full_warmup_steps else phases
    lengths = [phase.path_length for phase in scheduled]
    return [config.model.num_layers if length is None else length for length in lengths]


def proposed_micro_batches(config: RunConfig, on_gpu: bool) -> tuple[int, ...]:
    """Return the largest micro batch for each phase of the schedule, to be written as raptr_ds.parallel.micro_batches.

    One keeps no more activations on the phase's paths than train_micro_batch_size_per_gpu does on the full path.
    """
    setting = setting_of(config, Device(is_gpu=on_gpu))
    return tuple(largest_micro_batch(setting, length) for length in scheduled_lengths(config))


def reduce_buffers_of(config: RunConfig, on_gpu: bool, zero_stage: int, data_parallel: int) -> int:
    """Return the number of ZeRO's gradient buffers at a stage and number of ranks: two if reductions overlap."""
    zero = {**config.deepspeed.get("zero_optimization", {}), "stage": zero_stage}
    overlaps = zero.get("overlap_comm", False)
    if on_gpu:
        overlaps = derive_overlap(zero, data_parallel, config.parallel, config.path.paths_per_step)
    return 2 if overlaps and zero_stage < 3 else 1


def setting_of(config: RunConfig, device: Device) -> Setting:
    """Return what a plan of the run needs besides its paths."""
    return Setting(
        config.model,
        layout_of(config, device.is_gpu),
        device,
        predictions_per_sequence(config),
        keep_up_to=config.parallel.keep_activations_up_to,
        micro_batches=micro_batches_of(config, path_method_of(config)),
    )
