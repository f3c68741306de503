"""From a run's configuration to its path method, and the numbers that the method's costs follow from."""

from raptr_ds.config.derive import balanced_stage_layers
from raptr_ds.config.load import RunConfig
from raptr_ds.data.denoisers import mean_predictions, resolve_denoisers
from raptr_ds.data.masked_lm import mean_predictions as mean_masked
from raptr_ds.paths import PathMethod, build_path_method
from raptr_ds.paths.balance import BalancedStages
from raptr_ds.paths.cost import ModelShape, head_cost_in_layers


def shape_of(config: RunConfig) -> ModelShape:
    """Return the model's shape; the vocabulary's size must be known."""
    names = ModelShape.__dataclass_fields__
    return ModelShape(**{name: getattr(config.model, name) for name in names})


def predictions_per_sequence(config: RunConfig) -> float:
    """Return the expected number of predicted positions of a full sequence: the objective's, whatever the data."""
    if config.model.architecture == "bert":
        return mean_masked(config.model.seq_length, config.objective.mask_rate)
    return mean_predictions(config.model.seq_length, resolve_denoisers(config.objective.denoisers))


def path_method_of(config: RunConfig) -> PathMethod:
    """Return the run's path method; the vocabulary's size must be known. Raises: ConfigError."""
    section = config.path
    return build_path_method(
        method=section.method,
        num_layers=config.model.num_layers,
        num_steps=config.train.steps,
        seed=config.train.seed,
        schedule=section.schedule,
        split=section.split,
        full_warmup_steps=section.full_warmup_steps,
        fixed_layers=section.fixed_layers,
        sampling=section.sampling,
        residual_scale=section.residual_scale,
        pld_gamma=section.pld_gamma,
        pld_theta=section.pld_theta,
        constant_length=section.constant_length,
        stages=balanced_stages_of(config),
    )


def balanced_stages_of(config: RunConfig) -> BalancedStages | None:
    """Return the stages that paths are balanced over, None for other sampling.

    What the head costs follows from the model and its objective alone, so that no layout changes a path.
    """
    if config.path.balance_stages is None:
        return None
    layers = balanced_stage_layers(config.path, config.parallel, config.model.num_layers)
    head = head_cost_in_layers(shape_of(config), predictions_per_sequence(config))
    return BalancedStages.of(layers, head_cost=head)
