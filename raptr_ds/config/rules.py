"""Rules between the keys of a run, by what they are about; each group yields a message for every rule that is broken.

Rules of the path section alone stand in path_sections.py, those of optimizer and schedule in optimization.py.
"""

import math
from collections.abc import Iterator
from operator import attrgetter

from raptr_ds.config.batch import divisors
from raptr_ds.config.derive import loss_scale_search_steps
from raptr_ds.config.optimization import broken_optimization_rules
from raptr_ds.config.path_sections import RandomSection, ScheduledSection
from raptr_ds.config.run import RunConfig
from raptr_ds.config.section_types import MOST_COUNT
from raptr_ds.config.usage import look_up

_HEADS, _TENSOR = "model.num_attention_heads", "parallel.tensor_model_parallel_size"
_EXPORTS = "checkpoint.export_interval"


def check_rules(config: RunConfig) -> list[str]:
    """Return the message of every rule that the run breaks."""
    return [
        *_model_rules(config),
        *_layout_rules(config),
        *_width_rules(config),
        *_memory_rules(config),
        *_objective_rules(config),
        *_engine_rules(config),
        *_non_finite_rules(config),
        *_export_rules(config),
        *_task_rules(config),
        *config.path.broken_rules(config.sizes),
        *broken_optimization_rules(config.optimizer, config.scheduler, config.train.steps),
    ]


def _model_rules(config: RunConfig) -> Iterator[str]:
    """Heads divide the width; rotary embedding turns pairs of channels; each process takes whole heads."""
    model = config.model
    yield from _multiple(config, "model.hidden_size", _HEADS)
    if model.position_embedding == "rotary" and model.head_dim % 2:
        yield (
            f"raptr_ds.model.hidden_size / num_attention_heads = {model.head_dim} must be even for position_embedding "
            "'rotary'. Change one of the two, or set raptr_ds.model.position_embedding to 'learned'."
        )
    yield from _multiple(config, _HEADS, _TENSOR, ": each process takes whole heads")
    yield from _multiple(config, "model.ffn_hidden_size", _TENSOR)


def _layout_rules(config: RunConfig) -> Iterator[str]:
    """sequence_parallel splits sequences into equal parts, and every pipeline stage has layers."""
    model, parallel = config.model, config.parallel
    stages = parallel.pipeline_model_parallel_size
    if parallel.sequence_parallel:
        yield from _multiple(
            config, "model.seq_length", _TENSOR, ": raptr_ds.parallel.sequence_parallel=true splits it"
        )
    if stages > model.num_layers:
        yield (
            f"raptr_ds.parallel.pipeline_model_parallel_size={stages} needs at least {stages} layers, one for each "
            f"stage; raptr_ds.model.num_layers={model.num_layers}. Set pipeline_model_parallel_size to "
            f"{model.num_layers} or less, or add layers."
        )
    counts = parallel.pipeline_layers
    if len(counts) != stages or sum(counts) != model.num_layers:
        yield (
            f"raptr_ds.parallel.pipeline_layers={list(counts)} has {len(counts)} stages and {sum(counts)} layers; it "
            f"must have pipeline_model_parallel_size={stages} entries that add up to raptr_ds.model.num_layers="
            f"{model.num_layers}. Correct it, or remove it: it is derived."
        )


def _width_rules(config: RunConfig) -> Iterator[str]:
    """Layers that run in parts have as many blocks of the MLP as heads, in whole tensors, and are not compiled."""
    data, cause = config.batch.data_parallel, config.narrowed_by
    if cause is None:
        return
    why = f": {cause} cuts the MLP into as many blocks as there are heads"
    yield from _multiple(config, "model.ffn_hidden_size", _HEADS, why)
    # Parts of a tensor can be frozen where a process has all of its optimizer state.
    is_whole = config.zero_stage == 0 or (config.zero_stage < 3 and data == 1)
    if config.path.skipped_update == "freeze" and not is_whole:
        yield (
            f"{cause} with skipped_update='freeze' needs whole tensors in the optimizer, and "
            f"zero_optimization.stage={config.zero_stage} cuts them over {data} data-parallel processes. Set "
            "zero_optimization.stage to 0, or raptr_ds.path.skipped_update to 'zero_grad'."
        )
    if config.train.compile:
        yield (
            f"raptr_ds.train.compile=true makes one graph for layers of one width, and {cause} changes "
            "it. Change one of the two."
        )


def _memory_rules(config: RunConfig) -> Iterator[str]:
    """micro_batches has a size for each phase, whose paths then have a known length, on one pipeline stage.

    Only the first thing that is wrong with it is reported.
    """
    path, parallel, sizes = config.path, config.parallel, config.parallel.micro_batches
    if not sizes:
        return
    written = f"raptr_ds.parallel.micro_batches={list(sizes)}"
    scheduled = isinstance(path, ScheduledSection)
    num_phases = len(path.phase_lengths) if scheduled else 1
    if num_phases not in {0, len(sizes)}:  # 0: the section reports a schedule that cannot be read
        phases = f"raptr_ds.path.schedule={path.schedule!r} has" if scheduled else f"method {path.method!r} has"
        yield (
            f"{written} has {len(sizes)} sizes, and {phases} {num_phases} phases. Write one size for each phase, or "
            "remove it: every micro batch then has train_micro_batch_size_per_gpu sequences."
        )
    elif path.paths_per_step > 1:
        yield (
            f"{written} with raptr_ds.path.paths_per_step={path.paths_per_step}: larger micro batches may be too few "
            "for that many paths. Remove one."
        )
    elif isinstance(path, RandomSection) and path.sampling == "bernoulli":
        yield (
            f"{written} needs paths of a known length; got raptr_ds.path.sampling='bernoulli'. Set sampling to "
            "'uniform' or 'balanced', or remove micro_batches."
        )
    elif parallel.pipeline_model_parallel_size > 1:
        yield (
            f"{written} with pipeline_model_parallel_size={parallel.pipeline_model_parallel_size} would leave fewer "
            "micro batches to fill the pipeline. Set pipeline_model_parallel_size to 1, or remove micro_batches."
        )
    elif parallel.activation_checkpointing:
        yield (
            f"{written} with activation_checkpointing=true: recomputation leaves few activations for a short path to "
            "free. Remove one; keep_activations_up_to switches recomputation off for short paths."
        )


def _objective_rules(config: RunConfig) -> Iterator[str]:
    """bert predicts a position of every sequence; denoisers are complete, of which the first wrong one is reported."""
    model, rate, denoisers = config.model, config.objective.mask_rate, config.objective.denoisers
    length = model.seq_length
    if model.architecture == "bert":
        if rate * length < 1:
            fixes = [f"seq_length to {math.ceil(1 / rate)} or more"] if 1 / rate <= MOST_COUNT else []
            fixes += [f"mask_rate to {math.ceil(1e4 / length) / 1e4:g} or more"] if length > 1 else []
            yield (
                f"raptr_ds.objective.mask_rate={rate} of raptr_ds.model.seq_length={length} is less than one position. "
                f"Set {', or '.join(fixes) or 'both to more'}."
            )
        return
    if isinstance(denoisers, str):
        return
    names = [denoiser.name for denoiser in denoisers]
    for index, denoiser in enumerate(denoisers):
        where = f"raptr_ds.objective.denoisers[{index}] ({denoiser.name!r}, kind {denoiser.kind!r})"
        if denoiser.problem is not None:
            yield f"{where} {denoiser.problem}"
        elif denoiser.mean_span is not None and denoiser.mean_span >= length:
            yield (
                f"{where}: mean_span={denoiser.mean_span:g} must be less than raptr_ds.model.seq_length={length}. "
                "Lower it, or use kind 'prefix'."
            )
        elif names.count(denoiser.name) > 1:
            yield f"{where}: the name is used {names.count(denoiser.name)} times. Give each denoiser its own."
        else:
            continue
        return


def _engine_rules(config: RunConfig) -> Iterator[str]:
    """What DeepSpeed's engines and torch's compiler can do."""
    stages, zero_stage = config.parallel.pipeline_model_parallel_size, config.zero_stage
    # DeepSpeed's ZeRO 1 with overlap_comm reduces what the last micro batch has a gradient of, and nothing else.
    if config.path.paths_per_step > 1 and zero_stage == 1 and config.zero.get("overlap_comm"):
        yield (
            f"raptr_ds.path.paths_per_step={config.path.paths_per_step} with zero_optimization.stage=1 and "
            "overlap_comm=true: DeepSpeed then reduces the gradients of the last micro batch's layers only. Remove "
            "overlap_comm, or set zero_optimization.stage to 2."
        )
    if stages > 1 and zero_stage > 1:
        yield (
            f"raptr_ds.parallel.pipeline_model_parallel_size={stages} needs zero_optimization.stage <= 1 (DeepSpeed's "
            f"pipeline engine); got {zero_stage}. Set zero_optimization.stage to 1, or pipeline_model_parallel_size "
            "to 1."
        )
    for timing in ("wall_clock_breakdown", "flops_profiler.enabled"):  # the second switches the first on
        if stages > 1 and look_up(config.deepspeed, timing):
            yield (
                f"{timing}=true with raptr_ds.parallel.pipeline_model_parallel_size={stages}: DeepSpeed's pipeline "
                f"engine then starts a timer twice and fails. Set {timing} to false, or pipeline_model_parallel_size "
                "to 1."
            )
    if config.train.compile and zero_stage > 2:
        yield (
            f"raptr_ds.train.compile=true needs zero_optimization.stage <= 2; got {zero_stage}, which gathers each "
            "parameter while its layer runs, by hooks that a compiled layer does not call. Set "
            "zero_optimization.stage to 2, or raptr_ds.train.compile to false."
        )
    if all(config.deepspeed.get(name, {}).get("enabled", False) for name in ("bf16", "fp16")):
        yield "bf16.enabled and fp16.enabled are both true. Set one of them to false."
    dtype = str(config.deepspeed.get("data_types", {}).get("grad_accum_dtype", config.precision)).lower()
    if dtype not in {config.precision, "fp32"}:
        yield (
            f"data_types.grad_accum_dtype={dtype!r} must be 'fp32' or the training's own precision, "
            f"{config.precision!r}. Set it to one of them, or remove it."
        )


def _non_finite_rules(config: RunConfig) -> Iterator[str]:
    """Steps that fp16 skips while it looks for its loss scale are no fault; a rollback has an occasion and a target."""
    limit, search = config.train.max_non_finite_steps, loss_scale_search_steps(config.deepspeed.get("fp16", {}))
    if limit and limit <= search:
        yield (
            f"raptr_ds.train.max_non_finite_steps={limit} must be more than {search}: fp16 may skip that many steps in "
            "a row until its loss scale fits (fp16.initial_scale_power + hysteresis - 1). Set it to "
            f"{search + 1} or more, or to 0, or lower fp16.initial_scale_power."
        )
    if config.train.on_non_finite == "rollback":
        if limit == 0:
            yield (
                "raptr_ds.train.on_non_finite='rollback' with max_non_finite_steps=0 would never act. "
                "Set max_non_finite_steps to 1 or more, or remove on_non_finite."
            )
        elif config.checkpoint.interval == 0:
            yield (
                "raptr_ds.train.on_non_finite='rollback' needs checkpoints to go back to; got "
                "raptr_ds.checkpoint.interval=0. Set interval to a number of steps, or on_non_finite to 'stop'."
            )


def _export_rules(config: RunConfig) -> Iterator[str]:
    """An export is made of a checkpoint."""
    export, interval = config.checkpoint.export_interval, config.checkpoint.interval
    if export and not interval:
        yield (
            f"raptr_ds.checkpoint.export_interval={export} exports checkpoints; got raptr_ds.checkpoint.interval=0. "
            f"Set interval to {export}, or a number that divides it."
        )
    elif export:
        yield from _multiple(config, _EXPORTS, "checkpoint.interval", ": checkpoints are exported")


def _task_rules(config: RunConfig) -> Iterator[str]:
    """Each task is scored once, on exports."""
    tasks = config.eval.tasks
    if twice := sorted({task for task in tasks if tasks.count(task) > 1}):
        yield f"raptr_ds.eval.tasks={list(tasks)} names {', '.join(twice)} twice. Name each task once."
    elif tasks:
        yield from _multiple(config, "eval.task_interval", _EXPORTS, ": exports are scored")


def _multiple(config: RunConfig, key: str, divisor_key: str, why: str = "") -> Iterator[str]:
    """Yield the message for a key whose value must be a multiple of another's and is not, with what would fit."""
    value, divisor = attrgetter(key, divisor_key)(config)
    if value % divisor:
        name, divisor_name = (dotted.rpartition(".")[2] for dotted in (key, divisor_key))
        fits = max(number for number in divisors(value) if number <= divisor)
        yield (
            f"raptr_ds.{key}={value} must be a multiple of raptr_ds.{divisor_key}={divisor}{why}. "
            f"Set {name} to {-(-value // divisor) * divisor}, or {divisor_name} to {fits}."
        )
