"""Rules between the keys of a run, as a table: each returns its error text or None.

Rules of the path section alone stand in path_sections.py, those of optimizer and schedule in optimization.py.
"""

import math
from collections.abc import Callable

from raptr_ds.config.batch import divisors
from raptr_ds.config.derive import loss_scale_search_steps
from raptr_ds.config.optimization import broken_optimization_rules
from raptr_ds.config.path_sections import RandomSection, ScheduledSection
from raptr_ds.config.run import RunConfig

Rule = Callable[[RunConfig], str | None]


def check_rules(config: RunConfig) -> list[str]:
    """Return the message of every rule that the run breaks."""
    return [
        *(message for rule in RULES if (message := rule(config)) is not None),
        *config.path.broken_rules(config.sizes),
        *broken_optimization_rules(config.optimizer, config.scheduler, config.train.steps),
    ]


def heads_divide_hidden(config: RunConfig) -> str | None:
    """hidden_size % num_attention_heads == 0."""
    model = config.model
    return _multiple("model.hidden_size", model.hidden_size, "model.num_attention_heads", model.num_attention_heads)


def rotary_needs_even_head(config: RunConfig) -> str | None:
    """Rotary embedding turns pairs of channels."""
    size = config.model.head_dim
    if config.model.position_embedding != "rotary" or size % 2 == 0:
        return None
    return (
        f"raptr_ds.model.hidden_size / num_attention_heads = {size} must be even for position_embedding 'rotary'. "
        "Change one of the two, or set raptr_ds.model.position_embedding to 'learned'."
    )


def tensor_divides_heads(config: RunConfig) -> str | None:
    """num_attention_heads % tensor_model_parallel_size == 0."""
    heads, tensor = config.model.num_attention_heads, config.parallel.tensor_model_parallel_size
    return _multiple("model.num_attention_heads", heads, _TENSOR, tensor, ": each process takes whole heads")


def tensor_divides_ffn(config: RunConfig) -> str | None:
    """ffn_hidden_size % tensor_model_parallel_size == 0."""
    ffn, tensor = config.model.ffn_hidden_size, config.parallel.tensor_model_parallel_size
    return _multiple("model.ffn_hidden_size", ffn, _TENSOR, tensor)


def sequence_parallel_has_ranks(config: RunConfig) -> str | None:
    """sequence_parallel splits over tensor ranks."""
    if not config.parallel.sequence_parallel or config.parallel.tensor_model_parallel_size > 1:
        return None
    return (
        "raptr_ds.parallel.sequence_parallel=true has no effect with tensor_model_parallel_size=1: it splits what the "
        "processes that share a layer have copies of. Set tensor_model_parallel_size to 2 or more, or "
        "sequence_parallel to false."
    )


def tensor_divides_sequence(config: RunConfig) -> str | None:
    """seq_length % tensor_model_parallel_size == 0 with sequence_parallel."""
    length, tensor = config.model.seq_length, config.parallel.tensor_model_parallel_size
    if not config.parallel.sequence_parallel:
        return None
    return _multiple(
        "model.seq_length", length, _TENSOR, tensor, ": raptr_ds.parallel.sequence_parallel=true splits it"
    )


def stages_have_layers(config: RunConfig) -> str | None:
    """Every pipeline stage holds a layer."""
    layers, stages = config.model.num_layers, config.parallel.pipeline_model_parallel_size
    if layers >= stages:
        return None
    return (
        f"raptr_ds.parallel.pipeline_model_parallel_size={stages} needs at least {stages} layers, one for each stage; "
        f"raptr_ds.model.num_layers={layers}. Set pipeline_model_parallel_size to {layers} or less, or add layers."
    )


def pipeline_layers_fit(config: RunConfig) -> str | None:
    """pipeline_layers names every stage and adds up to num_layers."""
    counts, stages = config.parallel.pipeline_layers, config.parallel.pipeline_model_parallel_size
    if counts is None or (len(counts) == stages and sum(counts) == config.model.num_layers):
        return None
    return (
        f"raptr_ds.parallel.pipeline_layers={list(counts)} has {len(counts)} stages and {sum(counts)} layers; it must "
        f"have pipeline_model_parallel_size={stages} entries that add up to raptr_ds.model.num_layers="
        f"{config.model.num_layers}. Correct it, or remove it: it is derived."
    )


def width_divides_the_mlp(config: RunConfig) -> str | None:
    """Under width the MLP has as many blocks as the layer has heads."""
    heads, ffn = config.model.num_attention_heads, config.model.ffn_hidden_size
    if config.path.narrowed_by is None:
        return None
    why = f": {config.path.narrowed_by} cuts the MLP into as many blocks as there are heads"
    return _multiple("model.ffn_hidden_size", ffn, "model.num_attention_heads", heads, why)


def width_freezes_whole_tensors(config: RunConfig) -> str | None:
    """Parts of a tensor can be frozen where a process has all of its optimizer state."""
    path, data = config.path, config.batch.data_parallel
    is_whole = config.zero_stage == 0 or (config.zero_stage < 3 and data == 1)
    if path.narrowed_by is None or path.skipped_update != "freeze" or is_whole:
        return None
    return (
        f"{path.narrowed_by} with skipped_update='freeze' needs whole tensors in the optimizer, and "
        f"zero_optimization.stage={config.zero_stage} cuts them over {data} data-parallel processes. Set "
        "zero_optimization.stage to 0, or raptr_ds.path.skipped_update to 'zero_grad'."
    )


def width_is_not_compiled(config: RunConfig) -> str | None:
    """A compiled layer has one width."""
    if config.path.narrowed_by is None or not config.train.compile:
        return None
    return (
        f"raptr_ds.train.compile=true makes one graph for layers of one width, and {config.path.narrowed_by} changes "
        "it. Change one of the two."
    )


def kept_activations_need_recomputation(config: RunConfig) -> str | None:
    """keep_activations_up_to is an exception from activation_checkpointing."""
    kept = config.parallel.keep_activations_up_to
    if not kept or config.parallel.activation_checkpointing:
        return None
    return (
        f"raptr_ds.parallel.keep_activations_up_to={kept} has no use with activation_checkpointing=false, which keeps "
        "all activations. Set activation_checkpointing to true, or remove keep_activations_up_to."
    )


def micro_batches_fit_the_phases(config: RunConfig) -> str | None:
    """micro_batches has a size for each phase, whose paths have a known length, on one pipeline stage."""
    path, parallel, sizes = config.path, config.parallel, config.parallel.micro_batches
    if not sizes:
        return None
    written = f"raptr_ds.parallel.micro_batches={list(sizes)}"
    scheduled = isinstance(path, ScheduledSection)
    num_phases = len(path.phase_lengths) if scheduled else 1
    if num_phases not in {0, len(sizes)}:  # 0: the section reports a schedule that cannot be read
        phases = f"raptr_ds.path.schedule={path.schedule!r} has" if scheduled else f"method {path.method!r} has"
        return (
            f"{written} has {len(sizes)} sizes, and {phases} {num_phases} phases. Write one size for each phase, or "
            "remove it: every micro batch then has train_micro_batch_size_per_gpu sequences."
        )
    if path.paths_per_step > 1:
        return (
            f"{written} with raptr_ds.path.paths_per_step={path.paths_per_step}: larger micro batches may be too few "
            "for that many paths. Remove one."
        )
    if isinstance(path, RandomSection) and path.sampling == "bernoulli":
        return (
            f"{written} needs paths of a known length; got raptr_ds.path.sampling='bernoulli'. Set sampling to "
            "'uniform' or 'balanced', or remove micro_batches."
        )
    if parallel.pipeline_model_parallel_size > 1:
        return (
            f"{written} with pipeline_model_parallel_size={parallel.pipeline_model_parallel_size} would leave fewer "
            "micro batches to fill the pipeline. Set pipeline_model_parallel_size to 1, or remove micro_batches."
        )
    if parallel.activation_checkpointing:
        return (
            f"{written} with activation_checkpointing=true: recomputation leaves few activations for a short path to "
            "free. Remove one; keep_activations_up_to switches recomputation off for short paths."
        )
    return None


def denoisers_are_complete(config: RunConfig) -> str | None:
    """Each denoiser has what its kind needs and nothing else, and its own name."""
    denoisers = config.objective.denoisers
    if config.model.architecture != "ul2" or isinstance(denoisers, str):
        return None
    names = [denoiser.name for denoiser in denoisers]
    for index, denoiser in enumerate(denoisers):
        where = f"raptr_ds.objective.denoisers[{index}] ({denoiser.name!r}, kind {denoiser.kind!r})"
        if denoiser.problem is not None:
            return f"{where} {denoiser.problem}"
        if denoiser.mean_span is not None and denoiser.mean_span >= config.model.seq_length:
            return f"{where}: mean_span={denoiser.mean_span:g} must be less than raptr_ds.model.seq_length=" + (
                f"{config.model.seq_length}. Lower it, or use kind 'prefix'."
            )
        if names.count(denoiser.name) > 1:
            return f"{where}: the name is used {names.count(denoiser.name)} times. Give each denoiser its own."
    return None


def mask_predicts_something(config: RunConfig) -> str | None:
    """At least one position of a sequence is predicted."""
    rate, length = config.objective.mask_rate, config.model.seq_length
    if config.model.architecture != "bert" or rate * length >= 1:
        return None
    other = f", or mask_rate to {math.ceil(1e4 / length) / 1e4:g} or more" if length > 1 else ""
    return (
        f"raptr_ds.objective.mask_rate={rate} of raptr_ds.model.seq_length={length} is less than one position. "
        f"Set seq_length to {math.ceil(1 / rate)} or more{other}."
    )


def overlapped_reduction_sees_every_path(config: RunConfig) -> str | None:
    """DeepSpeed's ZeRO 1 with overlap_comm reduces what the last micro batch has a gradient of, and nothing else."""
    if config.path.paths_per_step == 1 or config.zero_stage != 1 or not config.zero.get("overlap_comm"):
        return None
    return (
        f"raptr_ds.path.paths_per_step={config.path.paths_per_step} with zero_optimization.stage=1 and overlap_comm="
        "true: DeepSpeed then reduces the gradients of the last micro batch's layers only. Remove overlap_comm, or "
        "set zero_optimization.stage to 2."
    )


def pipeline_allows_zero_stage(config: RunConfig) -> str | None:
    """DeepSpeed's pipeline engine takes ZeRO 0 and 1."""
    stages = config.parallel.pipeline_model_parallel_size
    if stages == 1 or config.zero_stage <= 1:
        return None
    return (
        f"raptr_ds.parallel.pipeline_model_parallel_size={stages} needs zero_optimization.stage <= 1 (DeepSpeed's "
        f"pipeline engine); got {config.zero_stage}. Set zero_optimization.stage to 1, or pipeline_model_parallel_size "
        "to 1."
    )


def compile_allows_zero_stage(config: RunConfig) -> str | None:
    """ZeRO 3 empties a layer's parameters between its uses; a graph is compiled for tensors that are there."""
    if not config.train.compile or config.zero_stage <= 2:
        return None
    return (
        f"raptr_ds.train.compile=true needs zero_optimization.stage <= 2; got {config.zero_stage}, which gathers each "
        "parameter while its layer runs, by hooks that a compiled layer does not call. Set zero_optimization.stage to "
        "2, or raptr_ds.train.compile to false."
    )


def one_precision(config: RunConfig) -> str | None:
    """bf16 or fp16, not both."""
    both = all(config.deepspeed.get(name, {}).get("enabled", False) for name in ("bf16", "fp16"))
    return "bf16.enabled and fp16.enabled are both true. Set one of them to false." if both else None


def accumulation_dtype_fits(config: RunConfig) -> str | None:
    """Gradients are accumulated in the model's own type, or in fp32."""
    dtype = str(config.deepspeed.get("data_types", {}).get("grad_accum_dtype", config.precision)).lower()
    if dtype in {config.precision, "fp32"}:
        return None
    return (
        f"data_types.grad_accum_dtype={dtype!r} must be 'fp32' or the training's own precision, {config.precision!r}. "
        "Set it to one of them, or remove it."
    )


def non_finite_limit_is_beyond_fp16s_search(config: RunConfig) -> str | None:
    """Steps that fp16 skips while it looks for its loss scale are no fault of the run."""
    limit, search = config.train.max_non_finite_steps, loss_scale_search_steps(config.deepspeed.get("fp16", {}))
    if not limit or limit > search:
        return None
    return (
        f"raptr_ds.train.max_non_finite_steps={limit} must be more than {search}: fp16 may skip that many steps in a "
        f"row until its loss scale fits (fp16.initial_scale_power + hysteresis - 1). Set it to {search + 1} or more, "
        "or to 0, or lower fp16.initial_scale_power."
    )


def rollback_can_happen(config: RunConfig) -> str | None:
    """A rollback has an occasion, and a checkpoint to go back to."""
    if config.train.on_non_finite != "rollback":
        return None
    if config.train.max_non_finite_steps == 0:
        return (
            "raptr_ds.train.on_non_finite='rollback' with max_non_finite_steps=0 would never act. "
            "Set max_non_finite_steps to 1 or more, or remove on_non_finite."
        )
    if config.checkpoint.interval == 0:
        return (
            "raptr_ds.train.on_non_finite='rollback' needs checkpoints to go back to; got "
            "raptr_ds.checkpoint.interval=0. Set interval to a number of steps, or on_non_finite to 'stop'."
        )
    return None


def exports_have_checkpoints(config: RunConfig) -> str | None:
    """An export is made of a checkpoint."""
    section = config.checkpoint
    if section.export_interval == 0:
        return None
    if section.interval == 0:
        return (
            f"raptr_ds.checkpoint.export_interval={section.export_interval} exports checkpoints; got "
            f"raptr_ds.checkpoint.interval=0. Set interval to {section.export_interval}, or a number that divides it."
        )
    return _multiple(
        "checkpoint.export_interval", section.export_interval, "checkpoint.interval", section.interval,
        ": checkpoints are exported",
    )  # fmt: skip


def task_keys_have_tasks(config: RunConfig) -> str | None:
    """Keys about downstream tasks, and about exports, are there for some."""
    for section, prefix, has_use, needed in (
        (config.eval, "eval.task_", config.eval.tasks, "eval.tasks"),
        (config.checkpoint, "checkpoint.export_", config.checkpoint.export_interval, "checkpoint.export_interval"),
    ):
        values = {f"{prefix.partition('.')[0]}.{name}": value for name, value in section if section.has_set(name)}
        given = [f"raptr_ds.{key}={value!r}" for key, value in values.items() if key.startswith(prefix)]
        if given and not has_use:
            return f"{', '.join(given)} without raptr_ds.{needed} has no use. Remove it, or set raptr_ds.{needed}."
    return None


def tasks_are_scored_on_exports(config: RunConfig) -> str | None:
    """Downstream tasks are scored on exports of a model that continues text."""
    tasks, interval = config.eval.tasks, config.checkpoint.export_interval
    if not tasks:
        return None
    written = f"raptr_ds.eval.tasks={list(tasks)}"
    if config.model.architecture != "ul2":
        return f"{written} scores continuations of a text, which bert has none of. Remove it: tasks are for ul2."
    if not interval:
        return (
            f"{written} is scored on exports; got raptr_ds.checkpoint.export_interval=0. Set it to a multiple of "
            "raptr_ds.checkpoint.interval."
        )
    if twice := sorted({task for task in tasks if tasks.count(task) > 1}):
        return f"{written} names {', '.join(twice)} twice. Name each task once."
    return _multiple(
        "eval.task_interval", config.eval.task_interval, "checkpoint.export_interval", interval, ": exports are scored"
    )


RULES: tuple[Rule, ...] = (
    heads_divide_hidden,
    rotary_needs_even_head,
    tensor_divides_heads,
    tensor_divides_ffn,
    sequence_parallel_has_ranks,
    tensor_divides_sequence,
    stages_have_layers,
    pipeline_layers_fit,
    width_divides_the_mlp,
    width_freezes_whole_tensors,
    width_is_not_compiled,
    kept_activations_need_recomputation,
    micro_batches_fit_the_phases,
    denoisers_are_complete,
    mask_predicts_something,
    overlapped_reduction_sees_every_path,
    pipeline_allows_zero_stage,
    compile_allows_zero_stage,
    one_precision,
    accumulation_dtype_fits,
    non_finite_limit_is_beyond_fp16s_search,
    rollback_can_happen,
    exports_have_checkpoints,
    task_keys_have_tasks,
    tasks_are_scored_on_exports,
)

_TENSOR = "parallel.tensor_model_parallel_size"


def _multiple(key: str, value: int | None, divisor_key: str, divisor: int, why: str = "") -> str | None:
    """Return the message for a value that must be a multiple of another and is not, with what would fit."""
    if value is None or value % divisor == 0:
        return None
    name, divisor_name = (dotted.rpartition(".")[2] for dotted in (key, divisor_key))
    fits = max(number for number in divisors(value) if number <= divisor)
    return (
        f"raptr_ds.{key}={value} must be a multiple of raptr_ds.{divisor_key}={divisor}{why}. "
        f"Set {name} to {-(-value // divisor) * divisor}, or {divisor_name} to {fits}."
    )
