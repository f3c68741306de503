"""What follows from other values: derived once, here, so that a run file holds only what differs."""

from collections.abc import Mapping, Sequence
from typing import Any

from raptr_ds.config.sections import ParallelSection, PathSection, TrainSection

_MAX_NON_FINITE_STEPS = 20


def derive_pipeline_layers(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Return the layers of each stage, as even as possible.

    Where the depth does not divide, the middle stages take the remainder: the first and last also hold the embedding
    and the head.
    """
    base, extra = divmod(num_layers, num_stages)
    from_the_middle = sorted(range(num_stages), key=lambda stage: (abs(2 * stage - num_stages + 1), stage))
    return tuple(base + (stage in from_the_middle[:extra]) for stage in range(num_stages))


def derive_parallel(parallel: ParallelSection, num_layers: int) -> ParallelSection:
    """Return the layout with the layers of each pipeline stage."""
    if parallel.pipeline_layers is not None:
        return parallel
    layers = derive_pipeline_layers(num_layers, parallel.pipeline_model_parallel_size)
    return parallel.model_copy(update={"pipeline_layers": layers})


def derive_overlap(zero: Mapping[str, Any], data_parallel: int, parallel: ParallelSection, paths_per_step: int) -> bool:
    """Return whether ZeRO reduces gradients during the backward pass on GPUs; overlap_comm of a run file goes first.

    With several paths a step DeepSpeed's stage 1 would forget some layers (docs/upstream.md); with pipeline stages it
    turns this off by itself; stage 3 always does it.
    """
    if "overlap_comm" in zero:
        return bool(zero["overlap_comm"])
    stage, stages = int(zero.get("stage", 0)), parallel.pipeline_model_parallel_size
    return stage == 3 or (stage in (1, 2) and data_parallel > 1 and stages == 1 and paths_per_step == 1)


def balanced_stage_layers(path: PathSection, parallel: ParallelSection, num_layers: int) -> tuple[int, ...]:
    """Return the layers of each stage that balanced sampling balances.

    These are the run's own pipeline stages where their number is balance_stages, else stages as even as possible.
    """
    assert path.balance_stages is not None
    if parallel.pipeline_layers is not None and len(parallel.pipeline_layers) == path.balance_stages:
        return parallel.pipeline_layers
    return derive_pipeline_layers(num_layers, path.balance_stages)


def count_fixed(fixed_layers: Sequence[int], num_layers: int) -> int:
    """Return how many different layers are fixed; those outside the model count too, as a rule refuses them."""
    return len({layer % num_layers if -num_layers <= layer < num_layers else layer for layer in fixed_layers})


NAMED_SCHEDULES = {
    "paper": (6, 8, 10, 12),
    "half": (2, 3, 7, 12),
    "gradual": (6, 9, 12),
    "doubling": (3, 6, 12),
}
"""Phases by name, in twelfths of the model: RaPTr's paper; half of its work (docs/results.md has what that is worth);
gradual and progressive stacking."""

_DEFAULT_SCHEDULES = {"raptr": "paper", "width": "paper", "stacking": "gradual"}


def derive_schedule(name: str, num_parts: int, num_fixed: int = 0) -> tuple[int, ...]:
    """Return the phases of a named schedule for a model of num_parts layers (or layers of as many heads).

    Rounded half up, with room for the fixed ones: `paper` gives 6-8-10-12 for 12 layers, 12-16-20-24 for 24.
    """
    twelfths = NAMED_SCHEDULES[name]
    return tuple(min(num_parts, max(num_fixed, 1, (num_parts * share + 6) // 12)) for share in twelfths)


def derive_path(
    path: PathSection, num_layers: int, num_steps: int, num_stages: int = 1, num_heads: int = 1
) -> PathSection:
    """Return the path section with its schedule, length or drop rate, warm-up steps and stages, where it uses them."""
    update: dict[str, Any] = {}
    num_fixed = count_fixed(path.fixed_layers, num_layers)
    name = path.schedule or _DEFAULT_SCHEDULES.get(path.method)
    if name in NAMED_SCHEDULES:
        parts = num_heads if path.method == "width" else num_layers
        phases = derive_schedule(name, parts, num_fixed if path.method == "raptr" else 0)
        update["schedule"] = "-".join(map(str, phases))
    lengths = derive_schedule("paper", num_layers, num_fixed)
    mean_length = (2 * sum(lengths) + len(lengths)) // (2 * len(lengths))
    if path.method == "constant" and path.constant_length is None:
        update["constant_length"] = mean_length
    if path.method == "layerdrop" and path.layerdrop is None:
        update["layerdrop"] = 1.0 - min(mean_length, num_layers - 0.5) / num_layers
    if path.method in {"raptr", "constant"} and path.sampling == "balanced" and path.balance_stages is None:
        update["balance_stages"] = num_stages
    if path.full_warmup_ratio is not None and not path.full_warmup_steps:
        update["full_warmup_steps"] = round(path.full_warmup_ratio * num_steps)
        update["full_warmup_ratio"] = None
    return path.model_copy(update=update)


def derive_train(train: TrainSection, fp16: Mapping[str, Any], name: str) -> TrainSection:
    """Return the train section with its folder, and the steps in a row without finite numbers that are borne."""
    update: dict[str, Any] = {}
    if train.save is None:
        update["save"] = f"runs/{name}"
    if train.max_non_finite_steps is None:
        update["max_non_finite_steps"] = max(_MAX_NON_FINITE_STEPS, loss_scale_search_steps(fp16) + 1)
    return train.model_copy(update=update)


def loss_scale_search_steps(fp16: Mapping[str, Any]) -> int:
    """Return how many steps in a row fp16's dynamic loss scale may skip until it is 1; 0 for a static scale.

    DeepSpeed's defaults are filled in: it starts at 2^16 and bears one overflow (hysteresis 2) before it halves.
    """
    if not fp16.get("enabled", False) or fp16.get("loss_scale", 0):
        return 0
    return int(fp16.get("initial_scale_power", 16)) + int(fp16.get("hysteresis", 2)) - 1
