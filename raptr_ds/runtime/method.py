"""From a run's configuration to its path method, and the numbers that the method's costs follow from."""

import numpy as np

from raptr_ds.config.derive import balanced_stage_layers
from raptr_ds.config.load import RunConfig
from raptr_ds.config.sections import PathSection
from raptr_ds.data.loader import predictions_per_sequence
from raptr_ds.paths import PathMethod, build_path_method
from raptr_ds.paths.balance import BalancedStages
from raptr_ds.paths.cost import head_cost_in_layers
from raptr_ds.paths.several import several_paths


def path_method_of(config: RunConfig, path: PathSection | None = None) -> PathMethod:
    """Return the run's path method, or that of another path section on the same run.

    The vocabulary's size must be known. Raises: ConfigError.
    """
    section = config.path if path is None else path

    def build(seed: int) -> PathMethod:
        return build_path_method(
            method=section.method,
            num_layers=config.model.num_layers,
            num_steps=config.train.steps,
            seed=seed,
            schedule=section.schedule,
            split=section.split,
            full_warmup_steps=section.full_warmup_steps,
            fixed_layers=section.fixed_layers,
            sampling=section.sampling,
            residual_scale=section.residual_scale,
            pld_gamma=section.pld_gamma,
            pld_theta=section.pld_theta,
            constant_length=section.constant_length,
            layerdrop=section.layerdrop,
            growth_optimizer_state=section.growth_optimizer_state,
            growth_warmup_steps=section.growth_warmup_steps,
            stages=balanced_stages_of(config),
            num_heads=config.model.num_attention_heads,
        )

    return several_paths(build, config.train.seed, section.paths_per_step)


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


def balanced_stages_of(config: RunConfig) -> BalancedStages | None:
    """Return the stages that paths are balanced over, None for other sampling.

    What the head costs follows from the model and its objective alone, so that no layout changes a path.
    """
    if config.path.balance_stages is None:
        return None
    layers = balanced_stage_layers(config.path, config.parallel, config.model.num_layers)
    head = head_cost_in_layers(config.model, predictions_per_sequence(config))
    return BalancedStages.of(layers, head_cost=head)
