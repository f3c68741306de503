"""Values that follow from others, so that a run file holds only what differs. The path's are in path_sections.py."""

from collections.abc import Mapping, Sequence
from typing import Any

from raptr_ds.config.deepspeed_keys import FP16_DEFAULTS
from raptr_ds.config.sections import ParallelSection, TrainSection

_MAX_NON_FINITE_STEPS = 20


def derive_pipeline_layers(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Return the layers of each stage, as even as possible.

    Where the depth does not divide, the middle stages take the remainder: the first and last also hold the embedding
    and the head.
    """
    base, extra = divmod(num_layers, num_stages)
    from_the_middle = sorted(range(num_stages), key=lambda stage: (abs(2 * stage - num_stages + 1), stage))
    return tuple(base + (stage in from_the_middle[:extra]) for stage in range(num_stages))


def balanced_layers(num_layers: int, balance_stages: int, pipeline_layers: Sequence[int]) -> tuple[int, ...]:
    """Return the layers of each stage that paths are balanced over: the pipeline's, if it has as many stages."""
    if len(pipeline_layers) == balance_stages:
        return tuple(pipeline_layers)
    return derive_pipeline_layers(num_layers, balance_stages)


def derive_overlap(zero: Mapping[str, Any], data_parallel: int, parallel: ParallelSection, paths_per_step: int) -> bool:
    """Return whether ZeRO reduces gradients during the backward pass on GPUs; overlap_comm of a run file decides.

    With several paths a step DeepSpeed's stage 1 would not reduce some layers (docs/upstream.md); with pipeline stages
    it turns this off; stage 3 always does it.
    """
    if "overlap_comm" in zero:
        return bool(zero["overlap_comm"])
    stage, stages = int(zero.get("stage", 0)), parallel.pipeline_model_parallel_size
    return stage == 3 or (stage in (1, 2) and data_parallel > 1 and stages == 1 and paths_per_step == 1)


def derive_train(train: TrainSection, fp16: Mapping[str, Any], name: str) -> TrainSection:
    """Return the train section with its folder and max_non_finite_steps."""
    update: dict[str, Any] = {}
    if train.save is None:
        update["save"] = f"runs/{name}"
    if train.max_non_finite_steps is None:
        update["max_non_finite_steps"] = max(_MAX_NON_FINITE_STEPS, loss_scale_search_steps(fp16) + 1)
    return train.model_copy(update=update)


def loss_scale_search_steps(fp16: Mapping[str, Any]) -> int:
    """Return how many steps in a row fp16's dynamic loss scale may skip until it is 1; 0 for a static scale.

    DeepSpeed's defaults are filled in: it starts at 2^16 and tolerates one overflow (hysteresis 2) before it halves.
    """
    if not fp16.get("enabled", False) or fp16.get("loss_scale", 0):
        return 0
    scale = {**FP16_DEFAULTS, **fp16}
    return int(scale["initial_scale_power"]) + int(scale["hysteresis"]) - 1
