"""From a run's configuration to its path method, and the numbers that the method's costs follow from."""

import numpy as np

from raptr_ds.config.derive import derive_pipeline_layers
from raptr_ds.config.path_sections import AnyPathSection, RandomSection
from raptr_ds.config.run import RunConfig
from raptr_ds.data.loader import predictions_per_sequence
from raptr_ds.parallel.topology import stage_layers
from raptr_ds.paths import PathMethod, build_path_method
from raptr_ds.paths.balance import BalancedStages
from raptr_ds.paths.cost import head_cost_in_layers
from raptr_ds.runtime.state import StepCost


def path_method_of(config: RunConfig, path: AnyPathSection | None = None) -> PathMethod:
    """Return the run's path method, or that of another checked path section on the same run.

    The vocabulary's size must be known.
    """
    section = config.path if path is None else path
    return build_path_method(section, config.sizes, config.train.seed, balanced_stages_of(config, section))


def step_cost_of(config: RunConfig) -> StepCost:
    """Return what the run's steps cost; the vocabulary's size must be known."""
    parallel = config.parallel
    return StepCost(
        config.model,
        config.batch.global_batch,
        parallel.activation_checkpointing,
        parallel.keep_activations_up_to,
        tuple(stage_layers(parallel.pipeline_layers or ())),
    )


def micro_batches_of(config: RunConfig, method: PathMethod) -> tuple[int, ...]:
    """Return the sequences of a micro batch in each phase of the run, a full-model warm-up included."""
    num_phases = len(method.phases.phases)
    sizes = config.parallel.micro_batches
    return (config.batch.micro_batch,) * (num_phases - len(sizes)) + sizes


def left_out_layers(method: PathMethod) -> list[str]:
    """Return a line for each phase in which some layers of the model are never active."""
    lines = []
    for phase in method.phases.phases:
        left_out = np.flatnonzero(method.marginals_at(phase.first_step) == 0.0).tolist()
        layers = method.model_at(phase.first_step).active_in(left_out)
        if layers and phase.num_steps:
            lines.append(
                f"layers {', '.join(map(str, layers))} are never active in phase {phase.index} (paths of "
                f"{phase.path_length}): raptr_ds.path.fixed_layers and the head leave no room in their stage. Lengthen "
                "the phase, fix fewer layers, or lower raptr_ds.path.balance_stages."
            )
    return lines


def balanced_stages_of(config: RunConfig, section: AnyPathSection) -> BalancedStages | None:
    """Return the stages that a path section balances paths over, None for other sampling.

    These are the run's own pipeline stages where their number is balance_stages, else stages as even as possible. What
    the head costs follows from the model and its objective alone, so that no layout changes a path.
    """
    if not isinstance(section, RandomSection) or section.balance_stages is None:
        return None
    layers = config.parallel.pipeline_layers or ()
    if len(layers) != section.balance_stages:
        layers = derive_pipeline_layers(config.model.num_layers, section.balance_stages)
    head = head_cost_in_layers(config.model, predictions_per_sequence(config))
    return BalancedStages.of(layers, head_cost=head)
