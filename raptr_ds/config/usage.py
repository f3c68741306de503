"""Which keys only some methods, architectures or ZeRO stages use: no key of a run file is ignored silently."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from raptr_ds.config.deepspeed_keys import (
    FP16_DEFAULTS,
    HARMLESS,
    PARTITIONED,
    STAGE_3_ONLY,
    STAGES_1_AND_2,
    ZERO_DEFAULTS,
    Check,
    loss_scale,
    zero_stage,
)
from raptr_ds.config.optimization import OPTIMIZERS, SCHEDULERS, canonical
from raptr_ds.config.overrides import Place, is_touched
from raptr_ds.config.path_sections import METHODS, PATH_SECTIONS
from raptr_ds.config.sections import BY_ARCHITECTURE, field_of, keys_of

METHOD, ARCHITECTURE = "raptr_ds.path.method", "raptr_ds.model.architecture"
POSITION = "raptr_ds.model.position_embedding"
STAGE, LOSS_SCALE = "zero_optimization.stage", "fp16.loss_scale"
_SAMPLING, _GROWTH_INIT = "raptr_ds.path.sampling", "raptr_ds.path.growth_init"
_TENSOR, _STAGES, _CHECKPOINTING = (
    f"raptr_ds.parallel.{key}"
    for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "activation_checkpointing")
)
_RATE, _PEAK = "optimizer.params.lr", "scheduler.params.warmup_max_lr"
_EXPORTS, _TASKS = "raptr_ds.checkpoint.export_interval", "raptr_ds.eval.tasks"


@dataclass(frozen=True)
class Use:
    """A key is used only where the value of `selector` fits.

    wanted: what fits, in words. why: why the key has no use elsewhere; empty: because it is for `wanted`. idle: values
    of the key that change nothing and so need no use.
    """

    key: str
    selector: str
    fits: Callable[[Any], bool]
    wanted: str
    why: str = ""
    idle: tuple[Any, ...] = ()


def _one_of(key: str, selector: str, *values: str | int, why: str = "", idle: tuple[Any, ...] = ()) -> Use:
    *others, last = map(repr, values)
    wanted = f"{', '.join(others)} or {last}" if others else last
    return Use(key, selector, values.__contains__, wanted, why, idle)


def _methods_with(key: str) -> tuple[str, ...]:
    return tuple(method for method, section in PATH_SECTIONS.items() if key in section.model_fields)


def _zero(key: str, *stages: int) -> Use:
    idle = (ZERO_DEFAULTS[key], "auto") if key in ZERO_DEFAULTS else ("auto",)  # check_table explains what auto is
    return _one_of(f"zero_optimization.{key}", STAGE, *stages, idle=idle)


USES = (
    *(_one_of(f"raptr_ds.path.{key}", METHOD, *_methods_with(key)) for key in keys_of("path")),
    _one_of("raptr_ds.path.balance_stages", _SAMPLING, "balanced"),
    _one_of(
        "raptr_ds.path.growth_optimizer_state",
        _GROWTH_INIT,
        "copied",
        why="the new layers are no copies",
        idle=("fresh",),
    ),
    _one_of("raptr_ds.parallel.micro_batches", METHOD, "raptr", "constant", "stacking", idle=([],)),
    Use(
        "raptr_ds.parallel.sequence_parallel",
        _TENSOR,
        lambda size: size > 1,
        "2 or more",
        why="it splits what the processes that share a layer have copies of",
        idle=(False,),
    ),
    Use(
        "raptr_ds.parallel.keep_activations_up_to",
        _CHECKPOINTING,
        bool,
        "true",
        why="all activations are kept",
        idle=(0,),
    ),
    _one_of("raptr_ds.model.rotary_base", POSITION, "rotary"),
    _one_of("raptr_ds.objective.mask_rate", ARCHITECTURE, "bert"),
    _one_of("raptr_ds.objective.whole_word", ARCHITECTURE, "bert"),
    _one_of("raptr_ds.objective.denoisers", ARCHITECTURE, "ul2"),
    Use(
        "raptr_ds.data.prefetch",
        "raptr_ds.data.num_workers",
        bool,
        "1 or more",
        why="no thread prepares steps ahead",
        idle=(keys_of("data")["prefetch"].default,),
    ),
    Use("raptr_ds.checkpoint.export_precision", _EXPORTS, bool, "a number of steps", idle=("fp32",)),
    _one_of(_TASKS, ARCHITECTURE, "ul2", why="bert has no continuations of a text to score", idle=([],)),
    Use(_TASKS, _EXPORTS, bool, "a number of steps", why="tasks are scored on exports", idle=([],)),
    *(
        Use(f"raptr_ds.eval.{key}", _TASKS, bool, "a list of tasks", why="there are no tasks", idle=(field.default,))
        for key, field in keys_of("eval").items()
        if key.startswith("task_")
    ),
    *(_zero(key, 1, 2, 3) for key in PARTITIONED),
    *(_zero(key, 1, 2) for key in STAGES_1_AND_2),
    *(_zero(key, 3) for key in STAGE_3_ONLY),
    Use(
        "zero_optimization.overlap_comm",
        _STAGES,
        lambda size: size == 1,
        "1",
        why="DeepSpeed's pipeline engine turns it off",
        idle=(False, "auto"),
    ),
    *(
        Use(f"fp16.{key}", LOSS_SCALE, lambda scale: not scale, "0", "a scale that is given stays", (default, "auto"))
        for key, default in FP16_DEFAULTS.items()
    ),
    _one_of("communication_data_type", STAGE, 1, 2, 3, idle=("auto",)),
)
"""A key that selects the use of others stands before them."""

_DEEPSPEED_SELECTORS: dict[str, Check] = {STAGE: zero_stage, LOSS_SCALE: loss_scale}

RIVALS = (
    ("raptr_ds.path.full_warmup_steps", "raptr_ds.path.full_warmup_ratio"),
    ("scheduler.params.warmup_num_steps", "scheduler.params.warmup_ratio"),
    ("scheduler.params.decay_num_steps", "scheduler.params.decay_ratio"),
    (_RATE, _PEAK),
)
"""Two ways to set one thing."""


def settle_unused(tree: dict[str, Any], touched: set[str], place: Place) -> tuple[dict[str, Any], list[str], list[str]]:
    """Return the tree without unused keys, the errors for keys that never had a use, and lines to print.

    A key of the file that loses its use because --set changed its selector (another method on the same file) is left
    out, and a line says so; so is what then loses its own use. A key without use in any other case is an error.
    `touched` holds the keys set by --set.
    """
    errors, notes, wrong = [], [], []
    changed = set(touched)
    for use in USES:
        value, given = _value_of(use.selector, tree), look_up(tree, use.key)
        if use.key in wrong or not _lacks_use(use, value, given):
            continue
        # The architecture decides the position embedding where the file does not.
        selectors = {use.selector, ARCHITECTURE} if use.selector == POSITION else {use.selector}
        selected = f"{use.selector}={_written(value)}"
        if _are_changed(selectors, changed) and not is_touched(use.key, touched):
            tree = without(tree, use.key)
            changed.add(use.key)
            by = " (from --set)" if _are_changed(selectors, touched) else ""
            notes.append(f"{use.key}: left out, as {selected}{by} does not use it")
        else:
            wrong.append(use.key)
            why = use.why or f"it is for {use.wanted}"
            errors.append(
                f"{use.key}={_written(given)}{place(use.key)} has no use with {selected}: {why}. Remove it, or set "
                f"{use.selector} to {use.wanted}."
            )
    for key in wrong:
        tree = without(tree, key)
    return tree, errors, notes


def without_harmless(tree: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the tree without DeepSpeed keys whose values change nothing here, and lines to print."""
    notes = []
    for key, values in HARMLESS.items():
        given = look_up(tree, key)
        if any(type(given) is type(value) and given == value for value in values):
            tree = without(tree, key)
            notes.append(f"{key}={_written(given)}: left out, as it changes nothing here")
    return tree, notes


def keep_used(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a complete tree without the keys that its selectors do not use."""
    for use in USES:
        if _lacks_use(use, _value_of(use.selector, tree), look_up(tree, use.key)):
            tree = without(tree, use.key)
    return tree


def settle_overridden(
    tree: dict[str, Any], touched: set[str], file: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Return the tree without keys of the file that --set replaces, and lines to print.

    These are parameters of the optimizer or schedule that another type, named by --set, does not have, and the other
    way to set what --set sets: --set of a warm-up in steps replaces the file's ratio. A peak learning rate that the
    file gives to its schedule stays the run's, whatever the schedule becomes. file: the tree before --set.
    """
    notes = []
    for part, types in (("optimizer", OPTIMIZERS), ("scheduler", SCHEDULERS)):
        kind, params = canonical(look_up(tree, f"{part}.type"), types), look_up(tree, f"{part}.params")
        if f"{part}.type" not in touched or kind is None or not isinstance(params, dict):
            continue
        for key in params:
            if key in types[kind] or f"{part}.params.{key}" in touched or "." in key:  # check_table reports dots
                continue
            tree = without(tree, f"{part}.params.{key}")
            notes.append(f"{part}.params.{key}: left out, as {part}.type={kind!r} (from --set) does not use it")
    for pair in RIVALS:
        given = [key for key in pair if look_up(tree, key) is not None]
        stays = [key for key in given if key in touched]
        if len(given) == 2 and len(stays) == 1:
            (gone,) = set(given) - set(stays)
            tree = without(tree, gone)
            notes.append(f"{gone}: left out, as {stays[0]} (from --set) replaces it")
    rate = look_up(file, _PEAK)
    is_lost = rate is not None and look_up(tree, _PEAK) is None and _PEAK not in touched
    if is_lost and look_up(tree, _RATE) is None:
        tree = _with_rate(tree, rate)
        notes.append(f"{_RATE}={rate!r}: the file's {_PEAK}, which the schedule from --set does not have")
    return tree, notes


def look_up(tree: dict[str, Any], dotted: str) -> Any:
    """Return the value at a dotted key, None if there is none."""
    node: Any = tree
    for part in dotted.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def without(tree: dict[str, Any], dotted: str) -> dict[str, Any]:
    """Return a copy of `tree` without the value at a dotted key, which it has."""
    head, _, rest = dotted.partition(".")
    if not rest:
        return {key: value for key, value in tree.items() if key != head}
    return {**tree, head: without(tree[head], rest)}


def _with_rate(tree: dict[str, Any], rate: Any) -> dict[str, Any]:
    """Return a copy of `tree` with a learning rate; the tree itself if its optimizer is no object."""
    optimizer = tree.get("optimizer", {})
    params = optimizer.get("params", {}) if isinstance(optimizer, dict) else None
    return {**tree, "optimizer": {**optimizer, "params": {**params, "lr": rate}}} if isinstance(params, dict) else tree


def _are_changed(selectors: set[str], changed: set[str]) -> bool:
    """Return whether one of them is among the changed keys, or in a section that is."""
    return any(selector == key or selector.startswith(f"{key}.") for selector in selectors for key in changed)


def _lacks_use(use: Use, value: Any, given: Any) -> bool:
    """Return whether a key is given, with an effect that it cannot have with this value of its selector."""
    return given is not None and value is not None and given not in use.idle and not use.fits(value)


def _value_of(selector: str, tree: dict[str, Any]) -> Any:
    """Return the value of a selector, given or by default.

    None if it is missing or wrong, which is another error: it then decides nothing.
    """
    value, field = look_up(tree, selector), field_of(selector)
    if selector == METHOD:
        value = METHODS[0] if value is None else value
        return value if value in METHODS else None
    if field is None:  # DeepSpeed's, 0 by default
        return (value or 0) if _DEEPSPEED_SELECTORS[selector](value or 0) is None else None
    if value is None and selector == POSITION:
        value = BY_ARCHITECTURE.get(str(look_up(tree, ARCHITECTURE)), {}).get("position_embedding")
    if value is None:
        return None if field.is_required() else field.default
    try:
        return _reader(selector).validate_python(value)
    except ValidationError:
        return None


@cache
def _reader(selector: str) -> TypeAdapter[Any]:
    """Return what takes the values that a section takes for the selector."""
    field = field_of(selector)
    assert field is not None, selector
    return TypeAdapter(field.rebuild_annotation(), config=ConfigDict(strict=True))


def _written(value: Any) -> str:
    """Return a value as messages write it."""
    if isinstance(value, bool):
        return str(value).lower()
    return repr(list(value) if isinstance(value, tuple) else value)
