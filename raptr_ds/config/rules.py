"""Cross-section rules of model, layout, path and objective, as a table: each returns its error text or None."""

import re
from collections.abc import Callable

from raptr_ds.config.derive import NAMED_SCHEDULES, count_fixed
from raptr_ds.config.draft import Draft
from raptr_ds.config.rules_training import TRAINING_RULES

Rule = Callable[[Draft], str | None]


def check_rules(draft: Draft) -> list[str]:
    """Return the message of every rule that the draft breaks."""
    return [message for rule in RULES if (message := rule(draft)) is not None]


def heads_divide_hidden(draft: Draft) -> str | None:
    """hidden_size % num_attention_heads == 0."""
    hidden, heads = draft.model.hidden_size, draft.model.num_attention_heads
    if hidden % heads == 0:
        return None
    return (
        f"raptr_ds.model.hidden_size={hidden} must be a multiple of num_attention_heads={heads}. "
        f"Set hidden_size to {-(-hidden // heads) * heads}, or num_attention_heads to {_divisor_near(hidden, heads)}."
    )


def rotary_needs_even_head(draft: Draft) -> str | None:
    """Rotary embedding turns pairs of channels."""
    size = draft.model.head_dim
    if draft.model.position_embedding != "rotary" or size % 2 == 0:
        return None
    return (
        f"raptr_ds.model.hidden_size / num_attention_heads = {size} must be even for position_embedding 'rotary'. "
        "Change one of the two, or set raptr_ds.model.position_embedding to 'learned'."
    )


def tensor_divides_heads(draft: Draft) -> str | None:
    """num_attention_heads % tensor_model_parallel_size == 0."""
    heads, tensor = draft.model.num_attention_heads, draft.parallel.tensor_model_parallel_size
    if heads % tensor == 0:
        return None
    return (
        f"raptr_ds.model.num_attention_heads={heads} must be a multiple of "
        f"raptr_ds.parallel.tensor_model_parallel_size={tensor}: each process takes whole heads. "
        f"Set tensor_model_parallel_size to {_divisor_near(heads, tensor)}, or change num_attention_heads."
    )


def tensor_divides_ffn(draft: Draft) -> str | None:
    """ffn_hidden_size % tensor_model_parallel_size == 0."""
    ffn, tensor = draft.model.ffn_hidden_size, draft.parallel.tensor_model_parallel_size
    if ffn is None or ffn % tensor == 0:
        return None
    return (
        f"raptr_ds.model.ffn_hidden_size={ffn} must be a multiple of "
        f"raptr_ds.parallel.tensor_model_parallel_size={tensor}. Set ffn_hidden_size to {-(-ffn // tensor) * tensor}, "
        f"or tensor_model_parallel_size to {_divisor_near(ffn, tensor)}."
    )


def sequence_parallel_has_ranks(draft: Draft) -> str | None:
    """sequence_parallel splits over tensor ranks."""
    if not draft.parallel.sequence_parallel or draft.parallel.tensor_model_parallel_size > 1:
        return None
    return (
        "raptr_ds.parallel.sequence_parallel=true has no effect with tensor_model_parallel_size=1: it splits what the "
        "processes that share a layer have copies of. Set tensor_model_parallel_size to 2 or more, or "
        "sequence_parallel to false."
    )


def tensor_divides_sequence(draft: Draft) -> str | None:
    """seq_length % tensor_model_parallel_size == 0 with sequence_parallel."""
    length, tensor = draft.model.seq_length, draft.parallel.tensor_model_parallel_size
    if not draft.parallel.sequence_parallel or length % tensor == 0:
        return None
    return (
        f"raptr_ds.parallel.sequence_parallel=true needs raptr_ds.model.seq_length={length} to be a multiple of "
        f"tensor_model_parallel_size={tensor}. Set seq_length to {-(-length // tensor) * tensor}, or "
        "sequence_parallel to false."
    )


def world_fits_layout(draft: Draft) -> str | None:
    """world_size % (tensor * pipeline) == 0."""
    world, size = draft.world_size, draft.model_parallel_size
    if world % size == 0:
        return None
    tensor, pipeline = draft.parallel.tensor_model_parallel_size, draft.parallel.pipeline_model_parallel_size
    return (
        f"{world} processes cannot be divided into raptr_ds.parallel.tensor_model_parallel_size={tensor} x "
        f"pipeline_model_parallel_size={pipeline} = {size}. Start a multiple of {size} processes, or lower the sizes."
    )


def stages_have_layers(draft: Draft) -> str | None:
    """Every pipeline stage holds a layer."""
    layers, stages = draft.model.num_layers, draft.parallel.pipeline_model_parallel_size
    if layers >= stages:
        return None
    return (
        f"raptr_ds.parallel.pipeline_model_parallel_size={stages} needs at least {stages} layers, one for each stage; "
        f"raptr_ds.model.num_layers={layers}. Set pipeline_model_parallel_size to {layers} or less, or add layers."
    )


def pipeline_layers_fit(draft: Draft) -> str | None:
    """pipeline_layers names every stage and adds up to num_layers."""
    counts, stages = draft.parallel.pipeline_layers, draft.parallel.pipeline_model_parallel_size
    if counts is None or (len(counts) == stages and sum(counts) == draft.model.num_layers):
        return None
    return (
        f"raptr_ds.parallel.pipeline_layers={list(counts)} has {len(counts)} stages and {sum(counts)} layers; it must "
        f"have pipeline_model_parallel_size={stages} entries that add up to raptr_ds.model.num_layers="
        f"{draft.model.num_layers}. Correct it, or remove it: it is derived."
    )


def fixed_layers_exist(draft: Draft) -> str | None:
    """Every fixed layer is a layer of the model."""
    layers = draft.model.num_layers
    outside = [layer for layer in draft.path.fixed_layers if not -layers <= layer < layers]
    if draft.path.method not in {"raptr", "constant"} or not outside:
        return None
    return (
        f"raptr_ds.path.fixed_layers={list(draft.path.fixed_layers)} has {outside[0]}; with raptr_ds.model.num_layers="
        f"{layers} a layer is {-layers}..{layers - 1}, negative ones counting from the end. Correct or remove it."
    )


def bernoulli_path_is_never_empty(draft: Draft) -> str | None:
    """Independent draws need a fixed layer, or a path could have none."""
    path = draft.path
    if path.method not in {"raptr", "constant"} or path.sampling != "bernoulli" or path.fixed_layers:
        return None
    return (
        "raptr_ds.path.sampling='bernoulli' with raptr_ds.path.fixed_layers=[] could draw a path without layers. "
        "Fix a layer, or set sampling to 'uniform'."
    )


def balanced_stages_have_layers(draft: Draft) -> str | None:
    """Every stage that paths are balanced over holds a layer."""
    stages, layers = draft.path.balance_stages, draft.model.num_layers
    if stages is None or stages <= layers or stages == draft.parallel.pipeline_model_parallel_size:
        return None  # too many pipeline stages are stages_have_layers' to tell
    return (
        f"raptr_ds.path.balance_stages={stages} needs at least {stages} layers, one for each stage; "
        f"raptr_ds.model.num_layers={layers}. Set it to {layers} or less, or remove it: it is derived."
    )


def schedule_is_written_well(draft: Draft) -> str | None:
    """A schedule is whole numbers joined by '-'."""
    schedule = draft.path.schedule
    if schedule is None or _lengths(schedule):
        return None
    return (
        f"raptr_ds.path.schedule={schedule!r} must be path lengths, whole numbers from 1, joined by '-', one for each "
        f"phase, or {' or '.join(map(repr, NAMED_SCHEDULES))}. Write it as '6-8-10-12', or remove it: one is derived."
    )


def schedule_fits_model(draft: Draft) -> str | None:
    """No phase is longer than the model is deep, or wider than a layer has heads; the last is the whole model."""
    lengths, is_width = _lengths(draft.path.schedule), draft.path.method == "width"
    key = "num_attention_heads" if is_width else "num_layers"
    most, what = getattr(draft.model, key), "heads" if is_width else "layers"
    if not lengths or (max(lengths) <= most and lengths[-1] == most):
        return None
    if max(lengths) > most:
        wrong = f"asks for more than the model has: {max(lengths)} {what}"
    else:
        wrong = f"must end with the full model, not at {lengths[-1]} {what}"
    return (
        f"raptr_ds.path.schedule={draft.path.schedule!r} {wrong}; raptr_ds.model.{key}={most}. "
        f"End it with {most} and keep the other phases at most that, or remove it: one for the model is derived."
    )


def width_divides_the_mlp(draft: Draft) -> str | None:
    """Under width the MLP has as many blocks as the layer has heads."""
    heads, ffn = draft.model.num_attention_heads, draft.model.ffn_hidden_size
    if draft.path.method != "width" or ffn is None or ffn % heads == 0:
        return None
    return (
        f"raptr_ds.path.method='width' cuts the MLP into as many blocks as there are heads: raptr_ds.model."
        f"ffn_hidden_size={ffn} must be a multiple of num_attention_heads={heads}. Set it to "
        f"{-(-ffn // heads) * heads}."
    )


def width_freezes_whole_tensors(draft: Draft) -> str | None:
    """Parts of a tensor can be frozen where a process has all of its optimizer state."""
    path, data = draft.path, max(1, draft.world_size // draft.model_parallel_size)
    is_whole = draft.zero_stage == 0 or (draft.zero_stage < 3 and data == 1)
    if path.method != "width" or path.skipped_update != "freeze" or is_whole:
        return None
    return (
        f"raptr_ds.path.method='width' with skipped_update='freeze' needs whole tensors in the optimizer, and "
        f"zero_optimization.stage={draft.zero_stage} cuts them over {data} data-parallel processes. Set "
        "zero_optimization.stage to 0, or raptr_ds.path.skipped_update to 'zero_grad'."
    )


def width_is_not_compiled(draft: Draft) -> str | None:
    """A compiled layer has one width."""
    if draft.path.method != "width" or not draft.train.compile:
        return None
    return (
        "raptr_ds.train.compile=true makes one graph for layers of one width, and raptr_ds.path.method='width' changes "
        "it. Set one of the two otherwise."
    )


def schedule_never_shrinks(draft: Draft) -> str | None:
    """Path length grows from phase to phase, or stays."""
    lengths = _lengths(draft.path.schedule)
    if list(lengths) == sorted(lengths):
        return None
    return (
        f"raptr_ds.path.schedule={draft.path.schedule!r} shrinks from one phase to the next; path lengths must grow or "
        f"stay. Write {'-'.join(map(str, sorted(lengths)))!r}, or use method 'pld' to drop more with time."
    )


def schedule_holds_fixed(draft: Draft) -> str | None:
    """Every phase has room for the fixed layers."""
    lengths = _lengths(draft.path.schedule)
    fixed = count_fixed(draft.path.fixed_layers, draft.model.num_layers)
    if draft.path.method != "raptr" or not lengths or min(lengths) >= fixed:
        return None
    return (
        f"raptr_ds.path.schedule={draft.path.schedule!r} has paths of {min(lengths)} layers, fewer than the {fixed} of "
        f"raptr_ds.path.fixed_layers={list(draft.path.fixed_layers)}, which are in every path. "
        f"Raise the schedule to at least {fixed}, or fix fewer layers."
    )


def constant_length_fits(draft: Draft) -> str | None:
    """A constant path holds the fixed layers and fits the model."""
    length, layers = draft.path.constant_length, draft.model.num_layers
    least = max(1, count_fixed(draft.path.fixed_layers, layers))
    if draft.path.method != "constant" or length is None or least <= length <= layers:
        return None
    return (
        f"raptr_ds.path.constant_length={length} must be {least}..{layers}: at least the fixed layers, at most "
        f"raptr_ds.model.num_layers. Change it, or remove it: one is derived."
    )


def full_warmup_said_once(draft: Draft) -> str | None:
    """Steps or ratio, not both."""
    if draft.path.full_warmup_ratio is None or not draft.path.full_warmup_steps:
        return None
    return (
        f"raptr_ds.path.full_warmup_steps={draft.path.full_warmup_steps} and full_warmup_ratio="
        f"{draft.path.full_warmup_ratio} say the same thing twice. Keep one."
    )


def full_warmup_ends(draft: Draft) -> str | None:
    """The full-model warm-up leaves steps for the schedule."""
    warmup, steps = draft.path.full_warmup_steps, draft.train.steps
    if draft.path.method not in {"raptr", "width"} or warmup < steps:
        return None
    return (
        f"raptr_ds.path.full_warmup_steps={warmup} must be less than raptr_ds.train.steps={steps}, or no random path "
        "is ever trained. Lower it, or write raptr_ds.path.full_warmup_ratio, a fraction of the steps."
    )


def denoisers_are_complete(draft: Draft) -> str | None:
    """Each denoiser has what its kind needs and nothing else, and a name of its own."""
    denoisers = draft.objective.denoisers
    if draft.model.architecture != "ul2" or isinstance(denoisers, str):
        return None
    names = [denoiser.name for denoiser in denoisers]
    needs = {"span": {"mean_span", "rate"}, "prefix": {"rate"}, "causal": set[str]()}
    for index, denoiser in enumerate(denoisers):
        where = f"raptr_ds.objective.denoisers[{index}] ({denoiser.name!r}, kind {denoiser.kind!r})"
        given = {key for key in ("mean_span", "rate") if getattr(denoiser, key) is not None}
        if missing := sorted(needs[denoiser.kind] - given):
            return f"{where} needs {' and '.join(missing)}. Set it."
        if extra := sorted(given - needs[denoiser.kind]):
            return f"{where} has no use for {' and '.join(extra)}. Remove it."
        if denoiser.mean_span is not None and denoiser.mean_span >= draft.model.seq_length:
            return f"{where}: mean_span={denoiser.mean_span:g} must be less than raptr_ds.model.seq_length=" + (
                f"{draft.model.seq_length}. Lower it, or use kind 'prefix'."
            )
        if names.count(denoiser.name) > 1:
            return f"{where}: the name is used {names.count(denoiser.name)} times. Give each denoiser its own."
    return None


def mask_predicts_something(draft: Draft) -> str | None:
    """At least one position of a sequence is predicted."""
    rate, length = draft.objective.mask_rate, draft.model.seq_length
    if draft.model.architecture != "bert" or rate * length >= 1:
        return None
    return (
        f"raptr_ds.objective.mask_rate={rate} of raptr_ds.model.seq_length={length} is less than one position. "
        f"Set mask_rate to {1 / length:.3g} or more, or lengthen the sequence."
    )


def kept_activations_are_recomputed_otherwise(draft: Draft) -> str | None:
    """keep_activations_up_to is an exception from activation_checkpointing."""
    kept = draft.parallel.keep_activations_up_to
    if not kept or draft.parallel.activation_checkpointing:
        return None
    return (
        f"raptr_ds.parallel.keep_activations_up_to={kept} has no use with activation_checkpointing=false, which keeps "
        "all activations. Set activation_checkpointing to true, or remove keep_activations_up_to."
    )


def micro_batch_can_grow(draft: Draft) -> str | None:
    """grow_micro_batch needs phases of known path length, one pipeline stage, and activations that are kept."""
    path, parallel = draft.path, draft.parallel
    if not parallel.grow_micro_batch:
        return None
    if path.paths_per_step > 1:
        return (
            f"raptr_ds.parallel.grow_micro_batch=true with raptr_ds.path.paths_per_step={path.paths_per_step}: larger "
            "micro batches may be too few for that many paths. Remove one."
        )
    if path.sampling == "bernoulli":
        return (
            "raptr_ds.parallel.grow_micro_batch=true needs paths of a known length; got raptr_ds.path.sampling="
            "'bernoulli'. Set sampling to 'uniform' or 'balanced', or remove grow_micro_batch."
        )
    if parallel.pipeline_model_parallel_size > 1:
        return (
            "raptr_ds.parallel.grow_micro_batch=true with pipeline_model_parallel_size="
            f"{parallel.pipeline_model_parallel_size} would leave fewer micro batches to fill the pipeline. Set "
            "pipeline_model_parallel_size to 1, or remove grow_micro_batch."
        )
    if parallel.activation_checkpointing:
        return (
            "raptr_ds.parallel.grow_micro_batch=true with activation_checkpointing=true: recomputation leaves few "
            "activations for a short path to free. Remove one; keep_activations_up_to switches recomputation off for "
            "short paths."
        )
    return None


RULES: tuple[Rule, ...] = (
    heads_divide_hidden,
    rotary_needs_even_head,
    tensor_divides_heads,
    tensor_divides_ffn,
    sequence_parallel_has_ranks,
    tensor_divides_sequence,
    world_fits_layout,
    stages_have_layers,
    pipeline_layers_fit,
    fixed_layers_exist,
    bernoulli_path_is_never_empty,
    balanced_stages_have_layers,
    schedule_is_written_well,
    schedule_fits_model,
    width_divides_the_mlp,
    width_freezes_whole_tensors,
    width_is_not_compiled,
    schedule_never_shrinks,
    schedule_holds_fixed,
    constant_length_fits,
    full_warmup_said_once,
    full_warmup_ends,
    kept_activations_are_recomputed_otherwise,
    micro_batch_can_grow,
    denoisers_are_complete,
    mask_predicts_something,
    *TRAINING_RULES,
)


def _lengths(schedule: str | None) -> tuple[int, ...]:
    """Return a schedule's path lengths; empty if there is none or it cannot be read."""
    if schedule is None or not re.fullmatch(r"0*[1-9]\d*(-0*[1-9]\d*)*", schedule):
        return ()
    return tuple(int(part) for part in schedule.split("-"))


def _divisor_near(whole: int, wanted: int) -> int:
    """Return the largest divisor of `whole` that is not above `wanted`."""
    return max(divisor for divisor in range(1, min(whole, wanted) + 1) if whole % divisor == 0)
