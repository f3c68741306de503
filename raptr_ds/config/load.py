"""From a run file, overrides and the number of processes to one checked, complete, frozen configuration."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from raptr_ds.config.batch import (
    BATCH_KEYS,
    BatchGeometry,
    check_micro_batches,
    check_paths_per_step,
    data_parallel_size,
    given_sizes,
    solve_batch,
)
from raptr_ds.config.deepspeed_keys import KNOWN
from raptr_ds.config.deepspeed_part import check_table
from raptr_ds.config.derive import derive_pipeline_layers, derive_train
from raptr_ds.config.differences import leaves
from raptr_ds.config.elastic import keep_global_batch
from raptr_ds.config.hjson_text import line_of, read_hjson
from raptr_ds.config.optimization import (
    check_optimizer,
    check_scheduler,
    complete_optimizer,
    complete_scheduler,
    schedule_warnings,
)
from raptr_ds.config.overrides import Place, apply_overrides, is_touched
from raptr_ds.config.parse_sections import parse_sections
from raptr_ds.config.path_sections import ScheduledSection, WarmedUpSection
from raptr_ds.config.rules import check_rules
from raptr_ds.config.run import RunConfig
from raptr_ds.config.schedules import idle_phases, steps_of_phases
from raptr_ds.config.sections import BLOCK, ParallelSection, field_of
from raptr_ds.config.usage import settle_overridden, settle_unused, without_harmless
from raptr_ds.errors import ConfigError, refused

DEFAULT_GRADIENT_CLIPPING = 1.0


def load_run_config(
    path: Path, overrides: Sequence[str] = (), world_size: int = 1, *, is_restart: bool = False
) -> RunConfig:
    """Read the run file at `path`, apply `--set` overrides, derive what is left out and check everything.

    1. The file's HJSON becomes a tree of plain values; `--set` changes it; nulls are dropped.
    2. Keys that `--set` made meaningless are left out; keys without use are errors.
    3. Each key is checked on its own: the sections are parsed, DeepSpeed's part is compared with its table.
    4. What is left out is derived, and gives the complete run.
    5. The rules that hold between keys are checked on the run.
    Passes 2 and 3, and pass 5, report all the errors that they find together.

    world_size: processes of the launch. is_restart: the run was started again without its user, perhaps on another
    number of processes (elastic.py).
    Raises: ConfigError that lists every problem found, each with its fix.
    """
    path = Path(path)
    file, text = read_hjson(path)
    tree, touched = apply_overrides(file, overrides)
    tree = _without_nulls(tree)

    def place(dotted: str) -> str:
        line = None if dotted in touched else line_of(text, dotted)
        return f" (line {line})" if line else " (from --set)" if is_touched(dotted, touched) else ""

    tree, harmless = without_harmless(tree)
    tree, replaced = settle_overridden(tree, touched, file)
    tree, errors, unused = settle_unused(tree, touched, place)
    sections, section_errors = parse_sections(tree, place)
    if errors := errors + section_errors + _check_deepspeed(tree, place):
        raise refused(path, errors)
    notes = harmless + replaced + unused
    sections["train"] = derive_train(sections["train"], tree.get("fp16", {}), path.stem)
    if is_restart:
        folder, paths_per_step = Path(sections["train"].save), sections["path"].paths_per_step
        tree, sections["parallel"], fitted = keep_global_batch(
            tree, folder, sections["parallel"], paths_per_step, world_size
        )
        notes += fitted
    config, batch_errors = _complete(tree, sections, world_size, notes)
    if errors := check_rules(config) + batch_errors:
        raise refused(path, errors)
    return replace(config, warnings=list(_warnings(config)))


def _check_deepspeed(tree: dict[str, Any], place: Place) -> list[str]:
    errors = check_table({key: value for key, value in tree.items() if key != BLOCK}, KNOWN, "", place)
    for name, check in (("optimizer", check_optimizer), ("scheduler", check_scheduler)):
        part = tree.get(name)
        if isinstance(part, dict) and isinstance(part.get("params", {}), dict):
            errors += check(part, place)
    return errors


def _complete(
    tree: dict[str, Any], sections: dict[str, Any], world_size: int, notes: list[str]
) -> tuple[RunConfig, list[str]]:
    """Return the run with everything derived, and what is wrong with its batch sizes.

    notes: lines to print before those of the derived values.
    """
    parallel, num_steps, scheduler = sections["parallel"], sections["train"].steps, tree.get("scheduler")
    if parallel.pipeline_layers is None:
        layers = derive_pipeline_layers(sections["model"].num_layers, parallel.pipeline_model_parallel_size)
        parallel = parallel.model_copy(update={"pipeline_layers": layers})
    optimizer = complete_optimizer(tree.get("optimizer"), scheduler)
    lr = optimizer["params"]["lr"]
    scheduler = complete_scheduler(scheduler, lr, num_steps)
    batch, errors = _solve_batch(tree, parallel, sections["path"].paths_per_step, world_size)
    deepspeed = {key: value for key, value in tree.items() if key not in {BLOCK, "scheduler"}}
    deepspeed["optimizer"] = optimizer
    deepspeed.setdefault("gradient_clipping", DEFAULT_GRADIENT_CLIPPING)
    deepspeed |= zip(BATCH_KEYS, (batch.global_batch, batch.micro_batch, batch.accumulation), strict=True)
    config = RunConfig(
        **{**sections, "parallel": parallel},
        batch=batch,
        optimizer=optimizer,
        scheduler=scheduler,
        deepspeed=copy.deepcopy(deepspeed),
    )
    config = replace(config, path=config.path.completed(config.sizes))
    given, complete = leaves(tree), leaves(config.resolved())
    lines = [f"{key}={value}" for key, value in complete.items() if key not in given and value and _is_derived(key)]
    return replace(config, derived=[*notes, *lines, f"data parallel size {batch.data_parallel}"]), errors


def _warnings(config: RunConfig) -> Iterator[str]:
    """Yield a line for each thing that the run, which breaks no rule, does and that is rarely meant."""
    path, num_steps = config.path, config.train.steps
    if isinstance(path, ScheduledSection):
        warmup = path.full_warmup_steps if isinstance(path, WarmedUpSection) else 0
        counts = steps_of_phases(path.phase_lengths, num_steps - warmup, path.split)
        yield from idle_phases(path.schedule, path.split, path.phase_lengths, counts)
    yield from schedule_warnings(config.scheduler, config.optimizer["params"]["lr"], num_steps)


def _solve_batch(
    tree: dict[str, Any], parallel: ParallelSection, paths_per_step: int, world_size: int
) -> tuple[BatchGeometry, list[str]]:
    """Return the batch and no error, or the sizes as they are given and what is wrong with them."""
    given = given_sizes(tree)
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    try:
        batch = solve_batch(*given, data_parallel=data_parallel_size(world_size, tensor, pipeline))
        check_paths_per_step(batch, paths_per_step)
        check_micro_batches(batch, parallel.micro_batches)
    except ConfigError as error:
        data_parallel = max(1, world_size // (tensor * pipeline))
        return BatchGeometry(*(size or 1 for size in given), data_parallel=data_parallel), [str(error)]
    return batch, []


def _is_derived(dotted: str) -> bool:
    """Return whether a value that the file does not give is worth a line, as it is no plain default of its section."""
    field = field_of(dotted)
    if field is None:
        return not dotted.startswith(f"{BLOCK}.")
    return field.default is None or dotted.endswith(".full_warmup_steps")


def _without_nulls(value: Any) -> Any:
    """Return a value without nulls in its objects, those in lists included: null leaves a key to its default."""
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
