"""The comparison file: what tools/experiment.py compares, on which seeds and budget; HJSON as run files."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError
from pydantic_core import ErrorDetails

from raptr_ds.config.hjson_text import line_of, read_hjson
from raptr_ds.config.overrides import apply_overrides, is_touched, write_value
from raptr_ds.config.parse_sections import causes
from raptr_ds.config.sections import Count, CountOrZero, Positive, Section, Text
from raptr_ds.errors import ConfigError, nearest, refused
from raptr_ds.user_paths import is_file

_LEVELS = 3  # of a run file's keys: raptr_ds.path.schedule, optimizer.params.lr; anything below is a value


def _as_settings(value: Any) -> Any:
    """Turn an object into settings: {raptr_ds: {path: {method: pld}}} becomes raptr_ds.path.method=pld."""
    return tuple(_flatten(value, "")) if isinstance(value, dict) else value


def _flatten(node: dict[str, Any], prefix: str) -> list[str]:
    settings = []
    for key, value in node.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict) and dotted.count(".") + 1 < _LEVELS:
            settings += _flatten(value, f"{dotted}.")
        else:
            settings.append(f"{dotted}={write_value(value)}")
    return settings


Settings = Annotated[tuple[Text, ...], BeforeValidator(_as_settings), Field(strict=False)]


class Contestant(Section):
    """One of those compared: the base run with another method, or any other settings."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]
    """Shown in the report, and a folder's name: letters, digits and . _ + - only."""
    method: Text | None = None
    """raptr_ds.path.method, or `standard` for full. Default: the base run's."""
    set: Settings = ()
    """Changes of the base run: a list of KEY=VALUE as for --set, or an object."""
    seeds: Annotated[tuple[CountOrZero, ...], Field(strict=False, min_length=1)] | None = None
    """Those of the comparison's seeds that this one runs on. Default: all."""

    @property
    def settings(self) -> tuple[str, ...]:
        """All that this contestant sets, as for --set."""
        if self.method is None:
            return self.set
        return (f"raptr_ds.path.method={'full' if self.method == 'standard' else self.method}", *self.set)


class Budget(Section):
    """`budget`: what all contestants get equally much of."""

    equal: Literal["steps", "flops", "time"] = "steps"
    """steps: optimizer steps. flops: executed FLOPs, head and embedding included. time: seconds in steps. The last two
    determine the steps of each contestant."""
    steps: Count | None = None
    """Steps of `of`, or of all contestants with equal steps. Default: the base run's."""
    of: Text | None = None
    """flops, time: the contestant whose run of `steps` steps is the budget. Default: the first."""
    flops: Positive | None = None
    """flops: the budget itself, instead of steps."""
    seconds: Positive | None = None
    """time: the budget itself, instead of steps."""
    step_time: Literal["measured", "planned"] = "measured"
    """time: from a short run of each contestant on this machine, or from the cost model of tools/plan.py."""
    probe_steps: Annotated[Count, Field(ge=10)] = 40
    """time, measured: steps of the short run."""
    tflops: Positive = 400.0
    """time, planned: the TFLOP/s that a device reaches."""


class Sweep(Section):
    """`sweep`: the learning rates that every contestant tries."""

    learning_rates: Annotated[tuple[Positive, ...], Field(strict=False, min_length=1)]
    """Peak rates to try, each in a run of full length."""
    seed: CountOrZero
    """The seed of these runs. One that is not among `seeds` keeps the choice independent of the comparison."""


class SlurmJob(Section):
    """`slurm`: the jobs that --slurm submits."""

    nodes: Count = 1
    """Nodes of one run; `processes` is a multiple of it."""
    at_once: Count | None = None
    """Runs at the same time, at most. Default: as many as the cluster allows."""
    options: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """Other options of sbatch: "--time=4:00:00", "--gpus-per-node=8", "--partition=NAME"."""


class Experiment(Section):
    """A comparison, as its file describes it."""

    base: Text
    """Run file that all contestants start from; relative to the current folder or to this file."""
    set: Settings = ()
    """Changes of the base run for all contestants: a list of KEY=VALUE as for --set, or an object."""
    contestants: Annotated[tuple[Contestant, ...], Field(strict=False, min_length=1)]
    """What is compared; the first is the one that the others are compared with."""
    seeds: Annotated[tuple[CountOrZero, ...], Field(strict=False, min_length=1)]
    """Each contestant has a run for each; runs of the same seed are paired."""
    budget: Budget = Budget()
    """What all contestants get equally much of."""
    sweep: Sweep | None = None
    """Learning rates to try. Default: the base run's rate for all."""
    processes: Count = 1
    """Processes of each run."""
    output: Text | None = None
    """Folder of the runs and the report. Default: runs/ and this file's name."""
    slurm: SlurmJob = SlurmJob()
    """The jobs that --slurm submits."""

    def contestant(self, name: str) -> Contestant:
        """Return the contestant of a name that exists."""
        return next(one for one in self.contestants if one.name == name)

    def seeds_of(self, contestant: Contestant) -> list[int]:
        """Return the seeds that a contestant runs on, in the comparison's order."""
        return [seed for seed in self.seeds if contestant.seeds is None or seed in contestant.seeds]

    @property
    def reference(self) -> str:
        """The contestant whose run is the budget."""
        return self.budget.of or self.contestants[0].name


_RULES = {
    "tuple_type": "must be a list, as [1, 2]",
    "too_short": "must have at least one item",
    "model_type": "must be an object {key: value}",
    "string_type": "must be text; put it in double quotes",
    "string_pattern_mismatch": "must be letters, digits and . _ + - only, the first one a letter or digit",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
}
"""Pydantic's types of error, in the words of a comparison file."""
_CONTROLLED = {
    "raptr_ds.train.steps": "budget.steps",
    "raptr_ds.train.seed": "seeds",
    "raptr_ds.train.save": "output",
}
_SWEPT = dict.fromkeys(("optimizer.params.lr", "scheduler.params.warmup_max_lr"), "sweep.learning_rates")


def load_experiment(file: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read a comparison file, with `--set` overrides of its keys; `base` and `output` become usable paths.

    Raises: ConfigError that lists every problem found.
    """
    if not is_file(file):
        raise ConfigError(f"comparison file {file} does not exist or is not a file. See experiments/ for examples.")
    tree, text = read_hjson(file)
    tree, touched = apply_overrides(tree, overrides)

    def place(dotted: str) -> str:
        line = None if is_touched(dotted, touched) else line_of(text, dotted)
        return f" (line {line})" if line else ""

    try:
        experiment = Experiment.model_validate(tree)
    except ValidationError as error:
        raise refused(file, [_message(detail, place) for detail in causes(error)]) from error
    base = Path(experiment.base)
    if not base.is_absolute() and not is_file(base) and is_file(file.parent / base):
        base = file.parent / base
    if not is_file(base):
        problem = f"base={experiment.base!r} does not exist here or beside the comparison file. Name a run file."
        raise refused(file, [problem])
    if problems := _problems(experiment):
        raise refused(file, problems)
    return experiment.model_copy(update={"base": str(base), "output": experiment.output or f"runs/{file.stem}"})


def _problems(experiment: Experiment) -> list[str]:
    budget, errors = experiment.budget, []
    names = [one.name for one in experiment.contestants]
    rates = () if experiment.sweep is None else experiment.sweep.learning_rates
    for what, values in {"contestants": names, "seeds": experiment.seeds, "sweep.learning_rates": rates}.items():
        repeated = sorted(str(value) for value, count in Counter(values).items() if count > 1)
        if repeated:
            errors.append(f"{what} has {', '.join(repeated)} more than once. Keep one of them, or rename the others.")
    for one in experiment.contestants:
        if unknown := sorted(set(one.seeds or ()).difference(experiment.seeds)):
            errors.append(
                f"contestant {one.name}: seeds has {', '.join(map(str, unknown))}, which is not among the comparison's "
                f"seeds={list(experiment.seeds)}. Remove it, or add it there."
            )
    if budget.of is not None and budget.of not in names:
        errors.append(f"budget.of={budget.of!r} is no contestant{nearest(budget.of, names) or '.'}")
    uses = {"of": ("flops", "time"), "flops": ("flops",), "seconds": ("time",), "step_time": ("time",)}
    uses |= {"probe_steps": ("time",), "tflops": ("time",)}
    for key, kinds in uses.items():
        if key in budget.model_fields_set and budget.equal not in kinds:
            errors.append(f"budget.{key} is not used with budget.equal={budget.equal}. Remove it.")
    for key in ("flops", "seconds"):
        if getattr(budget, key) is not None and (budget.steps is not None or budget.of is not None):
            errors.append(f"budget.{key} is the budget itself: remove budget.steps and budget.of, or budget.{key}.")
    if experiment.processes % experiment.slurm.nodes:
        errors.append(
            f"processes={experiment.processes} is not a multiple of slurm.nodes={experiment.slurm.nodes}. Change one."
        )
    controlled = _CONTROLLED | (_SWEPT if rates else {})
    settings = {"set": experiment.set} | {f"contestant {one.name}": one.settings for one in experiment.contestants}
    for where, setting in ((where, setting) for where, several in settings.items() for setting in several):
        key, equals, _ = setting.partition("=")
        key = key.strip()
        if not equals or not re.fullmatch(r"[^.\s]+(\.[^.\s]+)*", key):
            errors.append(f"{where}: {setting!r} is not KEY=VALUE with a dotted key of the run file.")
        elif key in controlled:
            errors.append(f"{where}: {key} is set by the comparison's {controlled[key]}. Remove it.")
    return errors


def _message(detail: ErrorDetails, place: Any) -> str:
    dotted = ".".join(str(part) for part in detail["loc"])
    name = str(detail["loc"][-1])
    if detail["type"] == "extra_forbidden":
        known = list(_model_at(detail["loc"][:-1]).model_fields)
        guess = nearest(name, known) or "."
        return f"{dotted}{place(dotted)} is an unknown key{guess} Correct or remove it. Keys there: {', '.join(known)}."
    if detail["type"] == "missing":
        about = _model_at(detail["loc"][:-1]).model_fields[name].description or ""
        return f"{dotted} is missing. {about.splitlines()[0]}"
    rule = _RULES.get(detail["type"]) or detail["msg"].replace("Input should", "must").replace("should", "must")
    return f"{dotted}={detail['input']!r}{place(dotted)}: {rule}."


def _model_at(location: Sequence[int | str]) -> type[BaseModel]:
    models = {"contestants": Contestant, "budget": Budget, "sweep": Sweep, "slurm": SlurmJob}
    return models.get(str(location[0]), Experiment) if location else Experiment
