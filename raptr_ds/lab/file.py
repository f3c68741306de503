"""The comparison file: what tools/experiment.py compares, on which seeds and budget, read as run files are."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError
from pydantic_core import ErrorDetails

from raptr_ds.config.hjson_text import line_of, read_hjson
from raptr_ds.config.overrides import apply_overrides, is_touched
from raptr_ds.config.sections import Count, CountOrZero, Positive, Section, Text
from raptr_ds.errors import ConfigError, nearest

_LEVELS = 3  # of a run file's keys: raptr_ds.path.schedule, optimizer.params.lr; what lies below is a value


def _as_settings(value: Any) -> Any:
    """Let an object stand for its dotted keys: {raptr_ds: {path: {method: pld}}} for raptr_ds.path.method=pld."""
    return tuple(_flatten(value, "")) if isinstance(value, dict) else value


def _flatten(node: dict[str, Any], prefix: str) -> list[str]:
    settings = []
    for key, value in node.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict) and dotted.count(".") + 1 < _LEVELS:
            settings += _flatten(value, f"{dotted}.")
        else:
            settings.append(f"{dotted}={value if isinstance(value, str) else json.dumps(value)}")
    return settings


Settings = Annotated[tuple[Text, ...], BeforeValidator(_as_settings), Field(strict=False)]


class Contestant(Section):
    """One of those that are compared: the base run with another method, or with anything else that --set can say."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]
    """Shown in the report, and a folder's name: letters, digits and . _ + - alone."""
    method: Text | None = None
    """raptr_ds.path.method, where standard is another word for full. Left out: the base run's."""
    set: Settings = ()
    """What differs from the base run: a list of KEY=VALUE as for --set, or an object."""

    @property
    def settings(self) -> tuple[str, ...]:
        """All that this contestant sets, as for --set."""
        if self.method is None:
            return self.set
        return (f"raptr_ds.path.method={'full' if self.method == 'standard' else self.method}", *self.set)


class Budget(Section):
    """`budget`: what all contestants get alike."""

    equal: Literal["steps", "flops", "time"] = "steps"
    """steps: as many optimizer steps. flops: as many executed FLOPs, head and embedding included. time: as many seconds
    in steps. For the last two the steps of each contestant follow."""
    steps: Count | None = None
    """Steps of `of`; with equal steps of everyone. Left out: the base run's."""
    of: Text | None = None
    """flops, time: the contestant whose run of `steps` steps is the budget. Left out: the first."""
    flops: Positive | None = None
    """flops: the budget itself, instead of steps."""
    seconds: Positive | None = None
    """time: the budget itself, instead of steps."""
    step_time: Literal["measured", "planned"] = "measured"
    """time: from a short run of each contestant on this machine, or from the cost model of tools/plan.py."""
    probe_steps: Annotated[Count, Field(ge=10)] = 40
    """time, measured: steps of that short run."""
    tflops: Positive = 400.0
    """time, planned: what a device reaches, in TFLOP/s."""


class Sweep(Section):
    """`sweep`: the learning rates that every contestant is tuned on, alike."""

    learning_rates: Annotated[tuple[Positive, ...], Field(strict=False, min_length=1)]
    """Peak rates to try, each in a run of full length."""
    seed: CountOrZero
    """The seed of the runs that choose. One that is not among `seeds` keeps the choice apart from the comparison."""


class SlurmJob(Section):
    """`slurm`: how --slurm asks for the array's jobs."""

    nodes: Count = 1
    """Nodes of one run; `processes` is a multiple of it."""
    at_once: Count | None = None
    """Runs that may go at the same time. Left out: as many as the cluster lets."""
    options: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """More options of sbatch: "--time=4:00:00", "--gpus-per-node=8", "--partition=NAME"."""


class Experiment(Section):
    """A comparison. `source` is the file; everything else stands in it."""

    base: Text
    """Run file that all contestants start from, found from where the command runs or beside this file."""
    set: Settings = ()
    """What differs from the base run for all contestants: a list of KEY=VALUE as for --set, or an object."""
    contestants: Annotated[tuple[Contestant, ...], Field(strict=False, min_length=1)]
    """Who is compared; the first is what the others are compared with."""
    seeds: Annotated[tuple[CountOrZero, ...], Field(strict=False, min_length=1)]
    """One run of each contestant for each; seed n of one is paired with seed n of the others."""
    budget: Budget = Budget()
    """What all contestants get alike."""
    sweep: Sweep | None = None
    """Learning rates to tune on. Left out: the base run's rate for all."""
    processes: Count = 1
    """Processes of each run."""
    output: Text | None = None
    """Folder of the runs and the report. Derived: runs/ and this file's name."""
    slurm: SlurmJob = SlurmJob()
    """How --slurm asks for the array's jobs."""

    def contestant(self, name: str) -> Contestant:
        """Return the contestant of a name that exists."""
        return next(one for one in self.contestants if one.name == name)

    @property
    def reference(self) -> str:
        """The contestant whose run is the budget."""
        return self.budget.of or self.contestants[0].name


_CONTROLLED = {
    "raptr_ds.train.steps": "budget.steps",
    "raptr_ds.train.seed": "seeds",
    "raptr_ds.train.save": "output",
}


def load_experiment(file: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read a comparison file, with `--set` overrides of its keys; base and output are made paths that can be used.

    Raises: ConfigError that lists every problem found.
    """
    if not file.is_file():
        raise ConfigError(
            f"comparison file {file} does not exist or is not a file. experiments/ holds some to start from."
        )
    tree, text = read_hjson(file)
    tree, touched = apply_overrides(tree, overrides)

    def place(dotted: str) -> str:
        line = None if is_touched(dotted, touched) else line_of(text, dotted)
        return f" (line {line})" if line else ""

    try:
        experiment = Experiment.model_validate(tree)
    except ValidationError as error:
        inside = {detail["loc"][0] for detail in error.errors() if len(detail["loc"]) > 1}
        details = [one for one in error.errors() if one["type"] != "too_short" or one["loc"][0] not in inside]
        raise _refusal(file, [_message(detail, place) for detail in details]) from error
    base = Path(experiment.base)
    if not base.is_absolute() and not base.is_file() and (file.parent / base).is_file():
        base = file.parent / base
    if not base.is_file():
        raise _refusal(
            file, [f"base={experiment.base!r} does not exist here or beside the comparison file. Name a run file."]
        )
    if problems := _problems(experiment):
        raise _refusal(file, problems)
    return experiment.model_copy(
        update={"base": str(base), "output": experiment.output or f"runs/{file.stem}"},
    )


def _problems(experiment: Experiment) -> list[str]:
    budget, errors = experiment.budget, []
    names = [one.name for one in experiment.contestants]
    for what, values in (
        ("contestants", names),
        ("seeds", experiment.seeds),
        ("sweep.learning_rates", _rates(experiment)),
    ):
        twice = sorted({str(value) for value in values if list(values).count(value) > 1})
        if twice:
            errors.append(f"{what} has {', '.join(twice)} more than once. Keep one of them, or name them apart.")
    if budget.of is not None and budget.of not in names:
        errors.append(f"budget.of={budget.of!r} is no contestant{nearest(budget.of, names) or '.'}")
    uses = {"of": ("flops", "time"), "flops": ("flops",), "seconds": ("time",), "step_time": ("time",)}
    uses |= {"probe_steps": ("time",), "tflops": ("time",)}
    for key, kinds in uses.items():
        if key in budget.model_fields_set and budget.equal not in kinds:
            errors.append(f"budget.{key} has no use with budget.equal={budget.equal}. Remove it.")
    for key in ("flops", "seconds"):
        if getattr(budget, key) is not None and (budget.steps is not None or budget.of is not None):
            errors.append(f"budget.{key} is the budget itself: remove budget.steps and budget.of, or budget.{key}.")
    if experiment.processes % experiment.slurm.nodes:
        errors.append(
            f"processes={experiment.processes} is not a multiple of slurm.nodes={experiment.slurm.nodes}. Change one."
        )
    for where, settings in (
        ("set", experiment.set),
        *((f"contestant {one.name}", one.settings) for one in experiment.contestants),
    ):
        errors += _controlled(where, settings, experiment.sweep is not None)
    return errors


def _rates(experiment: Experiment) -> tuple[float, ...]:
    return () if experiment.sweep is None else experiment.sweep.learning_rates


def _controlled(where: str, settings: Sequence[str], is_swept: bool) -> list[str]:
    controlled = dict(_CONTROLLED)
    if is_swept:
        controlled |= dict.fromkeys(("optimizer.params.lr", "scheduler.params.warmup_max_lr"), "sweep.learning_rates")
    errors = []
    for setting in settings:
        key, equals, _ = setting.partition("=")
        if not equals or not re.fullmatch(r"[^.\s]+(\.[^.\s]+)*", key.strip()):
            errors.append(f"{where}: {setting!r} is not KEY=VALUE with a dotted key of the run file.")
        elif key.strip() in controlled:
            errors.append(
                f"{where}: {key.strip()} is the comparison's to set, by {controlled[key.strip()]}. Remove it."
            )
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
    rule = detail["msg"].replace("Input should", "must").replace("should", "must")
    return f"{dotted}={detail['input']!r}{place(dotted)}: {rule}."


def _model_at(location: Sequence[int | str]) -> type[BaseModel]:
    models: dict[str, type[BaseModel]] = {
        "contestants": Contestant,
        "budget": Budget,
        "sweep": Sweep,
        "slurm": SlurmJob,
    }
    return models.get(str(location[0]), Experiment) if location else Experiment


def _refusal(file: Path, errors: list[str]) -> ConfigError:
    if len(errors) == 1:
        return ConfigError(f"{file}: {errors[0]}")
    listed = "\n".join(f"  {number}. {error}" for number, error in enumerate(errors, 1))
    return ConfigError(f"{file}: {len(errors)} problems:\n{listed}")
