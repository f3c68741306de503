"""Path methods by name: plain values of the run file's `path` section make a pure function from step to path."""

from collections.abc import Sequence

from raptr_ds.errors import ConfigError, nearest
from raptr_ds.paths.balance import BalancedStages
from raptr_ds.paths.baselines import FullPaths, LayerDrop, ProgressiveLayerDropping
from raptr_ds.paths.protocol import PathMethod
from raptr_ds.paths.raptr import RandomPaths
from raptr_ds.paths.schedule import check_lengths, one_phase, parse_schedule, resolve_fixed_layers, split_phases
from raptr_ds.paths.stacking import Stacking
from raptr_ds.paths.width import RandomWidths

METHODS = ("full", "raptr", "pld", "constant", "layerdrop", "stacking", "width")


def _check_stages(stages: BalancedStages | None, num_layers: int) -> None:
    if stages is None or sum(stages.num_layers) != num_layers:
        given = "none were given" if stages is None else f"got {list(stages.num_layers)}"
        raise ConfigError(
            f"raptr_ds.path.sampling='balanced' needs the layers of each pipeline stage, which add up to num_layers="
            f"{num_layers}; {given}. Set raptr_ds.path.balance_stages, or sampling to 'uniform'."
        )


def _lengths(method: str, schedule: str | None, num_layers: int, num_fixed: int) -> tuple[int, ...]:
    if schedule is None:
        raise ConfigError(f"raptr_ds.path.method={method!r} needs raptr_ds.path.schedule, for example '6-8-10-12'.")
    lengths = parse_schedule(schedule)
    check_lengths(lengths, num_layers, num_fixed)
    return lengths


def build_path_method(
    *,
    method: str,
    num_layers: int,
    num_steps: int,
    seed: int,
    schedule: str | None = None,
    split: str = "uniform",
    full_warmup_steps: int = 0,
    fixed_layers: Sequence[int] = (0, -1),
    sampling: str = "uniform",
    residual_scale: str = "none",
    pld_gamma: float = 0.001,
    pld_theta: float = 0.5,
    constant_length: int | None = None,
    layerdrop: float | None = None,
    growth_optimizer_state: str = "copied",
    growth_warmup_steps: int = 0,
    stages: BalancedStages | None = None,
    num_heads: int | None = None,
) -> PathMethod:
    """Return the method that a run's `path` section names; values that a method has no use for are not looked at.

    raptr uses schedule, split, full_warmup_steps, fixed_layers, sampling and residual_scale; constant the last three
    and constant_length; layerdrop itself and residual_scale; pld residual_scale, pld_gamma and pld_theta; stacking
    schedule, split, growth_optimizer_state and growth_warmup_steps; width schedule (of num_heads), split,
    full_warmup_steps and residual_scale; full none. Balanced sampling balances `stages`.
    Raises: ConfigError if the values do not make a method for this depth and number of steps.
    """
    if method == "full":
        return FullPaths(one_phase(num_layers, num_steps), num_layers)
    if method == "pld":
        if not (0.0 <= pld_theta <= 1.0 and pld_gamma >= 0.0):
            raise ConfigError(
                f"raptr_ds.path.pld_theta={pld_theta}, pld_gamma={pld_gamma}: theta is a probability, 0..1, and gamma "
                "a rate per step, 0 or more. The paper uses 0.5 and 0.001."
            )
        phases = one_phase(None, num_steps)
        return ProgressiveLayerDropping(phases, num_layers, seed, pld_gamma, pld_theta, residual_scale)
    if method == "layerdrop":
        if layerdrop is None or not 0.0 <= layerdrop < 1.0:
            raise ConfigError(f"raptr_ds.path.layerdrop={layerdrop} must be a probability, from 0 to less than 1.")
        return LayerDrop(one_phase(None, num_steps), num_layers, seed, layerdrop, residual_scale)
    if method == "stacking":
        lengths = _lengths(method, schedule, num_layers, 0)
        phases = split_phases(lengths, num_layers, num_steps, split)
        return Stacking(phases, num_layers, growth_optimizer_state == "copied", growth_warmup_steps)
    if method == "width":
        assert num_heads is not None, "a schedule of heads needs their number"
        lengths = _lengths(method, schedule, num_heads, 1)
        widths = split_phases(lengths, num_heads, num_steps, split, full_warmup_steps)
        return RandomWidths.of(widths, num_layers, seed, num_heads, residual_scale)
    fixed = resolve_fixed_layers(fixed_layers, num_layers)
    if sampling == "balanced":
        _check_stages(stages, num_layers)
    if method == "raptr":
        lengths = _lengths(method, schedule, num_layers, len(fixed))
        phases = split_phases(lengths, num_layers, num_steps, split, full_warmup_steps)
        return RandomPaths(phases, num_layers, seed, fixed, sampling, residual_scale, stages)
    if method == "constant":
        if constant_length is None or not max(1, len(fixed)) <= constant_length <= num_layers:
            raise ConfigError(
                f"raptr_ds.path.constant_length={constant_length} must be {max(1, len(fixed))}..{num_layers} for "
                f"method 'constant' (fixed layers .. num_layers)."
            )
        phases = split_phases((constant_length,), num_layers, num_steps, full_warmup_steps=full_warmup_steps)
        return RandomPaths(phases, num_layers, seed, fixed, sampling, residual_scale, stages)
    raise ConfigError(f"raptr_ds.path.method={method!r} must be one of {', '.join(METHODS)}{nearest(method, METHODS)}.")
