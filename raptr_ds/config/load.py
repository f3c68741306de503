"""From a run file, overrides and the number of processes to one checked, complete, frozen configuration."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from raptr_ds.config.batch import ACCUMULATION, GLOBAL, MICRO, BatchGeometry, check_paths_per_step, solve_batch
from raptr_ds.config.deepspeed_part import BLOCK, check_deepspeed_part
from raptr_ds.config.derive import derive_parallel, derive_path, derive_train
from raptr_ds.config.draft import Draft
from raptr_ds.config.hjson_text import line_of, read_hjson
from raptr_ds.config.optimization import check_optimizer, check_scheduler, complete_optimizer, complete_scheduler
from raptr_ds.config.overrides import apply_overrides, is_touched
from raptr_ds.config.parse_sections import parse_sections
from raptr_ds.config.rules import check_rules
from raptr_ds.config.sections import (
    SECTIONS,
    CheckpointSection,
    DataSection,
    EvalSection,
    LogSection,
    ModelSection,
    ObjectiveSection,
    ParallelSection,
    PathSection,
    Section,
    TrainSection,
)
from raptr_ds.config.usage import keep_used, look_up, settle_overridden, settle_unused
from raptr_ds.errors import ConfigError

DEFAULT_GRADIENT_CLIPPING = 1.0


@dataclass(frozen=True)
class RunConfig:
    """A run, complete: every derived value is there, every rule holds. Nothing changes it.

    optimizer, scheduler: {type, params} as in the file, completed. deepspeed: the dictionary for
    deepspeed.initialize, without scheduler and raptr_ds, batch sizes filled in; treat all three as read-only.
    derived: lines for people, what followed from what. Only model.vocab_size may still be None: see with_vocab_size.
    """

    model: ModelSection
    parallel: ParallelSection
    path: PathSection
    objective: ObjectiveSection
    data: DataSection
    train: TrainSection
    eval: EvalSection
    checkpoint: CheckpointSection
    log: LogSection
    batch: BatchGeometry
    precision: str
    zero_stage: int
    gradient_clipping: float
    optimizer: dict[str, Any]
    scheduler: dict[str, Any] | None
    deepspeed: dict[str, Any]
    derived: list[str] = field(default_factory=list, compare=False)

    def with_vocab_size(self, vocab_size: int) -> "RunConfig":
        """Return the run with the tokenizer's vocabulary. Raises: ConfigError if the file says another size."""
        said = self.model.vocab_size
        if not said:
            line = f"raptr_ds.model.vocab_size={vocab_size} (the tokenizer's)"
            model = self.model.model_copy(update={"vocab_size": vocab_size})
            return replace(self, model=model, derived=[*self.derived, line])
        if said != vocab_size:
            raise ConfigError(
                f"raptr_ds.model.vocab_size={said} does not match the tokenizer, which has {vocab_size} entries. "
                f"Remove vocab_size (the tokenizer's is taken), set it to {vocab_size}, or use the other tokenizer."
            )
        return self

    def compiles(self, on_gpu: bool) -> bool:
        """Whether layers are to be compiled on such a device: as the run file says, else on GPUs where they can be."""
        if self.train.compile is not None:
            return self.train.compile
        return on_gpu and self.zero_stage <= 2 and self.path.method != "width"

    def resolved(self) -> dict[str, Any]:
        """Return the whole run as a JSON-able run file that says everything; loading it gives this run again."""
        tree = dict(self.deepspeed)
        if self.scheduler is not None:
            tree["scheduler"] = self.scheduler
        block = {name: getattr(self, name).model_dump(mode="json", exclude_none=True) for name in SECTIONS}
        return cast(dict[str, Any], _plain(keep_used({**tree, BLOCK: block})))


def load_run_config(path: Path, overrides: Sequence[str] = (), world_size: int = 1) -> RunConfig:
    """Read the run file at `path`, apply `--set` overrides, derive what is left out and check everything.

    world_size: processes of the launch. Raises: ConfigError that lists every problem found, each with its mend.
    """
    path = Path(path)
    tree, text = read_hjson(path)
    tree, touched = apply_overrides(tree, overrides)

    def place(dotted: str) -> str:
        line = None if dotted in touched else line_of(text, dotted)
        return f" (line {line})" if line else " (from --set)" if is_touched(dotted, touched) else ""

    tree = _without_nulls(tree)
    tree, notes = settle_overridden(tree, touched)
    tree, errors, unused = settle_unused(tree, touched, place)
    sections, section_errors = parse_sections(tree.get(BLOCK), place)
    errors += section_errors + check_deepspeed_part(tree, place)
    for name, check in (("optimizer", check_optimizer), ("scheduler", check_scheduler)):
        part = tree.get(name)
        if isinstance(part, dict) and isinstance(part.get("params", {}), dict):
            errors += check(part, place)
    _raise_all(errors, path)
    draft, derived = _complete(tree, sections, world_size, path)
    errors = check_rules(draft)
    batch = None
    if world_size % draft.model_parallel_size == 0:
        try:
            batch = solve_batch(*_batch_sizes(tree), world_size // draft.model_parallel_size)
            check_paths_per_step(batch, draft.path.paths_per_step)
        except ConfigError as error:
            errors.append(str(error))
    _raise_all(errors, path)
    assert batch is not None
    return _finish(draft, batch, notes + unused + derived, tree)


def _complete(
    tree: dict[str, Any], sections: dict[str, Section], world_size: int, path: Path
) -> tuple[Draft, list[str]]:
    """Return the draft with everything derived but the batch, and a line for each value that was."""
    train = derive_train(cast(TrainSection, sections["train"]), tree.get("fp16", {}), path.stem)
    model = cast(ModelSection, sections["model"])
    parallel = derive_parallel(cast(ParallelSection, sections["parallel"]), model.num_layers)
    num_stages = parallel.pipeline_model_parallel_size
    complete = {
        "model": model,
        "parallel": parallel,
        "path": derive_path(
            cast(PathSection, sections["path"]), model.num_layers, train.steps, num_stages, model.num_attention_heads
        ),
        "train": train,
    }
    optimizer = complete_optimizer(tree.get("optimizer"), tree.get("scheduler"))
    scheduler = complete_scheduler(tree.get("scheduler"), optimizer["params"]["lr"], train.steps)
    deepspeed = {key: value for key, value in tree.items() if key not in {BLOCK, "scheduler"}}
    deepspeed["optimizer"] = optimizer
    deepspeed.setdefault("gradient_clipping", DEFAULT_GRADIENT_CLIPPING)
    if optimizer["type"] == "SGD":
        # SGD works on each number alone, so ZeRO's cut of the parameters is harmless; DeepSpeed wants to be told.
        deepspeed.setdefault("zero_allow_untested_optimizer", True)
    draft = Draft(
        **cast(dict[str, Any], {**sections, **complete}),
        optimizer=optimizer,
        scheduler=scheduler,
        deepspeed=deepspeed,
        world_size=world_size,
    )
    after = {**deepspeed, BLOCK: {name: value.model_dump(mode="json") for name, value in complete.items()}}
    if scheduler is not None:
        after["scheduler"] = scheduler
    return draft, _derived_lines(tree, keep_used(after))


def _finish(draft: Draft, batch: BatchGeometry, derived: list[str], tree: dict[str, Any]) -> RunConfig:
    sizes = {GLOBAL: batch.global_batch, MICRO: batch.micro_batch, ACCUMULATION: batch.accumulation}
    lines = [f"{key}={value}" for key, value in sizes.items() if look_up(tree, key) is None]
    return RunConfig(
        **{name: getattr(draft, name) for name in SECTIONS},
        batch=batch,
        precision=draft.precision,
        zero_stage=draft.zero_stage,
        gradient_clipping=float(draft.deepspeed["gradient_clipping"]),
        optimizer=draft.optimizer,
        scheduler=draft.scheduler,
        deepspeed=cast(dict[str, Any], _plain({**draft.deepspeed, **sizes})),
        derived=[*derived, *lines, f"data parallel size {batch.data_parallel}"],
    )


def _batch_sizes(tree: dict[str, Any]) -> tuple[int | None, int | None, int | None]:
    given = [tree.get(key) for key in (GLOBAL, MICRO, ACCUMULATION)]
    sizes = [None if value is None else int(value) for value in given]
    return sizes[0], sizes[1], sizes[2]


def _derived_lines(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """Return `key=value` for every value of `after` that is new or different, Nones left out."""
    lines = []
    for key, value in after.items():
        old = before.get(key) if isinstance(before, dict) else None
        if isinstance(value, dict):
            lines += _derived_lines(old or {}, value, f"{prefix}{key}.")
        elif old is None and value not in (None, 0) and _is_derived(f"{prefix}{key}"):
            lines.append(f"{prefix}{key}={value}")
    return lines


def _is_derived(dotted: str) -> bool:
    """Tell a value that followed from others from a plain default of its section."""
    parts = dotted.split(".")
    if parts[0] != BLOCK:
        return True
    default = SECTIONS[parts[1]].model_fields[parts[2]].default
    return default is None or parts[2] == "full_warmup_steps"


def _without_nulls(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the tree without nulls: null says that a key is left to its default."""
    return {
        key: _without_nulls(value) if isinstance(value, dict) else value
        for key, value in tree.items()
        if value is not None
    }


def _plain(value: Any) -> Any:
    """Return a deep copy of nested dictionaries and sequences, for JSON."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _raise_all(errors: list[str], path: Path) -> None:
    if len(errors) == 1:
        raise ConfigError(f"{path}: {errors[0]}")
    if errors:
        listed = "\n".join(f"  {number}. {error}" for number, error in enumerate(errors, 1))
        raise ConfigError(f"{path}: {len(errors)} problems:\n{listed}")
