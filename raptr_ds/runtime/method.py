"""From a run's configuration to its path method, and the numbers that the method's costs follow from."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from raptr_ds.config.derive import balanced_layers
from raptr_ds.config.path_sections import AnyPathSection, RandomSection
from raptr_ds.config.run import RunConfig
from raptr_ds.data.loader import predictions_per_sequence
from raptr_ds.errors import CheckpointError
from raptr_ds.paths import PathMethod, Phase, build_path_method
from raptr_ds.paths.balance import BalancedStages
from raptr_ds.paths.cost import StepFlops, head_cost_in_layers
from raptr_ds.paths.stages import stage_layers

if TYPE_CHECKING:  # engines import megatron-core, which the planner does not need
    from raptr_ds.checkpoint.manager import RestoredState

LAYERS = "layers"
"""The key in a checkpoint's run state of the layers that its model has; earlier versions did not record them."""


def path_method_of(config: RunConfig, path: AnyPathSection | None = None) -> PathMethod:
    """Return the run's path method, or that of another checked path section on the same run.

    The vocabulary's size must be known.
    """
    section = config.path if path is None else path
    return build_path_method(section, config.sizes, config.train.seed, balanced_stages_of(config, section))


def step_cost_of(config: RunConfig) -> StepFlops:
    """Return what the run's steps cost; the vocabulary's size must be known."""
    parallel = config.parallel
    return StepFlops(
        config.model,
        config.batch.global_batch,
        parallel.activation_checkpointing,
        parallel.keep_activations_up_to,
        tuple(stage_layers(parallel.pipeline_layers)),
    )


def micro_batches_of(config: RunConfig, method: PathMethod) -> tuple[int, ...]:
    """Return the sequences of a micro batch in each phase of the run, a full-model warm-up included."""
    num_phases = len(method.phases)
    sizes = config.parallel.micro_batches
    return (config.batch.micro_batch,) * (num_phases - len(sizes)) + sizes


def existing_layers(method: PathMethod, step: int) -> list[int]:
    """Return the layers that the model has after `step` steps."""
    return list(method.model_at(max(0, step - 1)).layers)


def check_layers(restored: RestoredState, method: PathMethod) -> None:
    """Check that the model in a checkpoint has the layers that it has at this step of the run.

    Raises: CheckpointError if a growth would come again, over layers that are trained, or would be left out.
    """
    here = existing_layers(method, restored.step)
    there = restored.run_state.get(LAYERS, here)
    if there == here:
        return
    has_all = len(there) == method.num_layers
    on = "To train on with all of them, set raptr_ds.path.method to full" if has_all else "Set these keys back"
    raise CheckpointError(
        f"the model in {restored.folder} has layers {_ranges(there)} after step {restored.step}, and by this run file "
        f"it would have layers {_ranges(here)} there: raptr_ds.path and raptr_ds.train.steps decide when a model "
        "grows, and new layers would replace trained ones, or would never be made. "
        f"{on}, or start anew with raptr_ds.checkpoint.load=none."
    )


def left_out_layers(method: PathMethod) -> list[str]:
    """Return a line for each set of layers of the model that is never active in some phases, with the reason."""
    phases_of: dict[tuple[tuple[int, ...], bool], list[Phase]] = {}
    for phase in method.phases:
        marginals = method.marginals_at(phase.first_step)
        layers = method.model_at(phase.first_step).active_in(np.flatnonzero(marginals == 0.0).tolist())
        if layers and phase.num_steps:
            is_drawn = bool(np.any((marginals > 0.0) & (marginals < 1.0)))
            phases_of.setdefault((layers, is_drawn), []).append(phase)
    return [_left_out(layers, phases, is_drawn) for (layers, is_drawn), phases in phases_of.items()]


def _left_out(layers: Sequence[int], phases: Sequence[Phase], is_drawn: bool) -> str:
    numbers = ", ".join(str(phase.index) for phase in phases)
    lengths = ", ".join(dict.fromkeys(str(phase.path_length) for phase in phases))
    where = f"phase{'s' * (len(phases) > 1)} {numbers} (paths of {lengths})"
    names = _ranges(layers)
    if is_drawn:
        why = "raptr_ds.path.fixed_layers and the head leave no room in their stage"
        fix = "Lengthen the phase, fix fewer layers, or lower raptr_ds.path.balance_stages"
    else:
        why, fix = "raptr_ds.path.fixed_layers fill them", "Lengthen the phase or fix fewer layers to draw from all"
    subject = f"layer {names} is" if len(layers) == 1 else f"layers {names} are"
    return f"{subject} never active in {where}: {why}. {fix}."


def _ranges(layers: Sequence[int]) -> str:
    runs = [[layer for _, layer in run] for _, run in groupby(enumerate(layers), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs) or "none"


def balanced_stages_of(config: RunConfig, section: AnyPathSection) -> BalancedStages | None:
    """Return the stages that a path section balances paths over, None for other sampling.

    These are the run's own pipeline stages where their number is balance_stages, else stages as even as possible. What
    the head costs follows from the model and its objective alone, so that no layout changes a path.
    """
    if not isinstance(section, RandomSection) or section.balance_stages is None:
        return None
    layers = balanced_layers(config.model.num_layers, section.balance_stages, config.parallel.pipeline_layers)
    head = head_cost_in_layers(config.model, predictions_per_sequence(config))
    return BalancedStages(layers, head)
