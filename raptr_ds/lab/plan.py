"""From a comparison file to its runs: the steps of each contestant, their learning rates, seeds and folders."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raptr_ds.config.load import load_run_config
from raptr_ds.config.overrides import write_value
from raptr_ds.config.path_sections import (
    ConstantSection,
    FullSection,
    LayerDropoutSection,
    LayerDropSection,
    RandomSection,
    RaptrSection,
    ScheduledSection,
    SkippingSection,
    StackingSection,
    WarmedUpSection,
)
from raptr_ds.config.run import RunConfig
from raptr_ds.data.loader import are_prepared, load_tokenizer, predictions_per_sequence
from raptr_ds.errors import ConfigError
from raptr_ds.lab.file import Contestant, Experiment
from raptr_ds.lab.status import StepTime, measured_step_time, status_of
from raptr_ds.planner.plan import plan_run
from raptr_ds.planner.setting import setting_of
from raptr_ds.planner.step_time import Device
from raptr_ds.runtime.method import path_method_of, step_cost_of

_STEPS = "raptr_ds.train.steps"
_FIXED = RandomSection.model_fields["fixed_layers"].default
_NEIGHBOURS = 3  # steps tried around the solution, as a schedule's rounding makes cost uneven


@dataclass(frozen=True)
class PlannedRun:
    """One run. settings: all that differs from the base run file; resolved: its whole configuration.

    purpose: probe (step time), tuning (learning rate) or comparison. learning_rate: None for the base run's.
    """

    purpose: str
    contestant: str
    seed: int
    learning_rate: float | None
    steps: int
    folder: Path
    settings: tuple[str, ...]
    resolved: Mapping[str, Any]

    @property
    def title(self) -> str:
        """The run in a few words."""
        rate = "" if self.learning_rate is None else f", learning rate {self.learning_rate:g}"
        return f"{self.contestant}, seed {self.seed}{rate}"


@dataclass(frozen=True)
class Share:
    """What a contestant gets: steps, their expected FLOPs and, for a budget of time, seconds. path: in words."""

    contestant: Contestant
    steps: int
    flops: float
    seconds: float | None
    path: str
    num_layers: int


@dataclass(frozen=True)
class Planner:
    """Makes the runs of a comparison. vocab_size: assumed where data are not prepared; None: they must be."""

    experiment: Experiment
    vocab_size: int | None = None
    _vocab_sizes: dict[str, int] = field(default_factory=dict, compare=False, repr=False)

    @property
    def output(self) -> Path:
        """The comparison's folder."""
        assert self.experiment.output is not None, "not derived"
        return Path(self.experiment.output)

    def check(self) -> None:
        """Check what can be checked before anything runs. Raises: ConfigError, DataError."""
        steps = self.experiment.budget.steps
        for one in self.experiment.contestants:
            if not self._config(one, [] if steps is None else [f"{_STEPS}={steps}"]).eval.batches:
                raise ConfigError(
                    f"contestant {one.name}: raptr_ds.eval.batches=0, but the comparison needs held-out "
                    "losses. Set it to 1 or more."
                )

    def probes(self) -> list[PlannedRun]:
        """Return the short runs that measure step times; empty where the budget needs none."""
        experiment = self.experiment
        if experiment.budget.equal != "time" or experiment.budget.step_time != "measured":
            return []
        extra = ["raptr_ds.eval.batches=0", "raptr_ds.eval.interval=0", "raptr_ds.checkpoint.save_on_exit=false"]
        steps = experiment.budget.probe_steps
        return [
            self._run("probe", one, experiment.seeds[0], None, steps, self.output / "probes" / one.name, extra)
            for one in experiment.contestants
        ]

    def shares(self) -> list[Share]:
        """Return what each contestant gets. Raises: ConfigError if step times are yet to be measured."""
        measured = {run.contestant: run for run in self.probes()}
        unmeasured = [name for name, run in measured.items() if not status_of(run.folder, run.resolved).is_finished]
        if unmeasured:
            raise ConfigError(f"the step times of {', '.join(unmeasured)} are not measured yet: run the comparison.")
        times = {name: measured_step_time(run.folder) for name, run in measured.items()}
        costs = {one.name: self._cost_of(one, times.get(one.name)) for one in self.experiment.contestants}
        budget, reference = self.experiment.budget, self.experiment.reference
        steps = budget.steps or self._config(self.experiment.contestant(reference)).train.steps
        total = budget.flops or budget.seconds or costs[reference](steps)
        shares = []
        for one in self.experiment.contestants:
            is_free = budget.equal != "steps" and (one.name != reference or bool(budget.flops or budget.seconds))
            number = equal_cost_steps(costs[one.name], total, steps) if is_free else steps
            seconds = costs[one.name](number) if budget.equal == "time" else None
            config = self._config(one, [f"{_STEPS}={number}"])
            flops, path = expected_flops(config), _describe_path(config)
            shares.append(Share(one, number, flops, seconds, path, config.model.num_layers))
        return shares

    def tuning_runs(self, shares: Sequence[Share]) -> list[PlannedRun]:
        """Return the runs that choose each contestant's learning rate."""
        sweep = self.experiment.sweep
        if sweep is None:
            return []
        return [self._full_run("tuning", share, sweep.seed, rate) for share in shares for rate in sweep.learning_rates]

    def comparison_runs(self, shares: Sequence[Share], rates: Mapping[str, float | None]) -> list[PlannedRun | None]:
        """Return the runs that are compared, seed by seed, so that pairs are complete early.

        rates: by contestant; None stands for the run of one that has none yet. A run with a tuning run's seed and rate
        is that run, in the same folder.
        """
        return [
            self._full_run("comparison", share, seed, rates[share.contestant.name])
            if share.contestant.name in rates
            else None
            for seed in self.experiment.seeds
            for share in shares
            if seed in self.experiment.seeds_of(share.contestant)
        ]

    def _full_run(self, purpose: str, share: Share, seed: int, rate: float | None) -> PlannedRun:
        folder = self.output / "runs" / share.contestant.name
        folder = folder / f"seed-{seed}" if rate is None else folder / f"lr-{rate:g}" / f"seed-{seed}"
        return self._run(purpose, share.contestant, seed, rate, share.steps, folder)

    def _run(
        self,
        purpose: str,
        contestant: Contestant,
        seed: int,
        rate: float | None,
        steps: int,
        folder: Path,
        extra: Sequence[str] = (),
    ) -> PlannedRun:
        save = f"raptr_ds.train.save={write_value(str(folder))}"
        own = [f"{_STEPS}={steps}", f"raptr_ds.train.seed={seed}", save, *extra]
        if rate is not None:
            own.append(f"optimizer.params.lr={rate!r}")
        config = self._config(contestant, own)
        settings = (*self.experiment.set, *contestant.settings, *own)
        return PlannedRun(purpose, contestant.name, seed, rate, steps, folder, settings, config.resolved())

    def _config(self, contestant: Contestant, own: Sequence[str] = ()) -> RunConfig:
        experiment = self.experiment
        settings = [*experiment.set, *contestant.settings, *own]
        try:
            config = load_run_config(Path(experiment.base), settings, experiment.processes)
        except ConfigError as error:
            raise ConfigError(f"contestant {contestant.name}: {error}") from error
        return config.with_vocab_size(self._vocabulary_of(config))

    def _vocabulary_of(self, config: RunConfig) -> int:
        if self.vocab_size is not None and not are_prepared(config.data.path):
            return config.model.vocab_size or self.vocab_size
        key = config.data.model_dump_json()
        if key not in self._vocab_sizes:
            self._vocab_sizes[key] = load_tokenizer(config.data).vocab_size
        return self._vocab_sizes[key]

    def _cost_of(self, contestant: Contestant, time: StepTime | None) -> Callable[[int], float]:
        """Return the function from steps to the cost of a contestant's run, in the budget's unit."""
        budget = self.experiment.budget

        def cost(steps: int) -> float:
            config = self._config(contestant, [f"{_STEPS}={steps}"])
            if budget.equal == "flops":
                return expected_flops(config)
            if budget.equal == "steps":
                return float(steps)
            if time is not None:
                return time.of_run(steps, path_method_of(config).expected_layers_from(0))
            device = Device(flops_per_second=budget.tflops * 1e12)
            return plan_run(path_method_of(config), setting_of(config, device)).seconds

        return cost


def expected_flops(config: RunConfig) -> float:
    """Return the FLOPs that a run's training is expected to execute, head included; the vocabulary must be known."""
    num_predicted = round(config.batch.global_batch * predictions_per_sequence(config))
    return step_cost_of(config).flops_left(path_method_of(config), 0, num_predicted)


def equal_cost_steps(cost: Callable[[int], float], budget: float, start: int = 1) -> int:
    """Return the number of steps, at least 1, whose cost is nearest to a budget; `cost` grows with steps.

    start: a number of steps that a run may have. `cost` raises ConfigError for too few: less than a warm-up has.
    Raises: ConfigError, that of `cost`, if the nearest number is among these.
    """

    def known(steps: int) -> float:
        try:
            return cost(steps)
        except ConfigError:
            return -math.inf  # too few

    low, high = 0, start
    while cost(high) < budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if known(middle) < budget else (low, middle)
    if low and known(low) == -math.inf and 2 * (cost(high) - budget) > cost(high + 1) - cost(high):
        cost(low)  # raises why a run of about this cost cannot be
    near = range(max(1, high - _NEIGHBOURS), high + _NEIGHBOURS)
    return min(near, key=lambda steps: (abs(known(steps) - budget), steps))


def choose_rate(losses: Mapping[float, float | None]) -> float | None:
    """Return the rate with the lowest held-out loss, None if no run has one (a loss that is not finite is None)."""
    finite = {rate: loss for rate, loss in losses.items() if loss is not None}
    return min(finite, key=lambda rate: (finite[rate], rate)) if finite else None


def _describe_path(config: RunConfig) -> str:
    path = config.path
    words: list[object] = [path.method]
    if isinstance(path, ScheduledSection):
        words += [path.schedule, *([] if path.split == "uniform" else [path.split])]
    if isinstance(path, RaptrSection) and path.width_schedule:
        words.append(f"by {path.width_schedule} heads")
    if isinstance(path, ConstantSection):
        words.append(path.constant_length)
    if isinstance(path, LayerDropSection):
        words.append(f"{path.layerdrop:.4g}")
    if isinstance(path, LayerDropoutSection):
        words.append(path.layer_dropout)
    if isinstance(path, FullSection):
        words.append(f"{config.model.num_layers} layer{'s' * (config.model.num_layers > 1)}")
    if isinstance(path, RandomSection):
        words += [] if path.sampling == "uniform" else [path.sampling]
        words += [] if path.fixed_layers == _FIXED else [f"fixed {list(path.fixed_layers)}"]
    if isinstance(path, WarmedUpSection) and path.full_warmup_steps:
        words.append(f"after {path.full_warmup_steps} full steps")
    if isinstance(path, StackingSection):
        words += ["in the middle"] * (path.growth_position == "middle")
        is_copy = path.growth_init == "copied"
        words.append(f"optimizer state {path.growth_optimizer_state}" if is_copy else f"{path.growth_init} layers")
    if isinstance(path, SkippingSection):
        words += [path.skipped_update, *([] if path.residual_scale == "none" else [path.residual_scale])]
    return " ".join(map(str, words))
