"""From a run's configuration to its path method, and the numbers that the method's costs follow from."""

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from raptr_ds.config.derive import balanced_layers
from raptr_ds.config.path_sections import AnyPathSection, RandomSection
from raptr_ds.config.run import RunConfig
from raptr_ds.data.loader import predictions_per_sequence
from raptr_ds.paths import PathMethod, Phase, build_path_method
from raptr_ds.paths.balance import BalancedStages
from raptr_ds.paths.cost import StepFlops, head_cost_in_layers
from raptr_ds.paths.stages import stage_layers


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
    runs = [[layer for _, layer in run] for _, run in groupby(enumerate(layers), key=lambda pair: pair[1] - pair[0])]
    names = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
    if is_drawn:
        why = "raptr_ds.path.fixed_layers and the head leave no room in their stage"
        fix = "Lengthen the phase, fix fewer layers, or lower raptr_ds.path.balance_stages"
    else:
        why, fix = "raptr_ds.path.fixed_layers fill them", "Lengthen the phase or fix fewer layers to draw from all"
    subject = f"layer {names} is" if len(layers) == 1 else f"layers {names} are"
    return f"{subject} never active in {where}: {why}. {fix}."


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
