"""Which keys only some methods, architectures or ZeRO stages use: no key of a run file is ignored silently."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from raptr_ds.config.deepspeed_keys import STAGE_3_ONLY
from raptr_ds.config.optimization import OPTIMIZERS, SCHEDULERS, canonical
from raptr_ds.config.overrides import is_touched

METHOD, ARCHITECTURE = "raptr_ds.path.method", "raptr_ds.model.architecture"
POSITION, STAGE = "raptr_ds.model.position_embedding", "zero_optimization.stage"
SAMPLING = "raptr_ds.path.sampling"


@dataclass(frozen=True)
class Use:
    """A key is used only where `selector` has one of `values`."""

    selector: str
    values: tuple[str | int, ...]


_RANDOM = Use(METHOD, ("raptr", "constant"))
_SKIPPING = Use(METHOD, ("raptr", "pld", "constant", "layerdrop", "width"))
_DRAWING = Use(METHOD, ("raptr", "pld", "constant", "layerdrop"))
_SCHEDULED = Use(METHOD, ("raptr", "stacking", "width"))
_WARMED_UP = Use(METHOD, ("raptr", "width"))
_GROWING = Use(METHOD, ("stacking",))

USED_ONLY: dict[str, Use] = {
    "raptr_ds.path.schedule": _SCHEDULED,
    "raptr_ds.path.split": _SCHEDULED,
    "raptr_ds.path.full_warmup_steps": _WARMED_UP,
    "raptr_ds.path.full_warmup_ratio": _WARMED_UP,
    "raptr_ds.path.fixed_layers": _RANDOM,
    SAMPLING: _RANDOM,
    "raptr_ds.path.balance_stages": Use(SAMPLING, ("balanced",)),
    "raptr_ds.path.residual_scale": _SKIPPING,
    "raptr_ds.path.skipped_update": _SKIPPING,
    "raptr_ds.path.paths_per_step": _DRAWING,
    "raptr_ds.path.pld_gamma": Use(METHOD, ("pld",)),
    "raptr_ds.path.pld_theta": Use(METHOD, ("pld",)),
    "raptr_ds.path.constant_length": Use(METHOD, ("constant",)),
    "raptr_ds.path.layerdrop": Use(METHOD, ("layerdrop",)),
    "raptr_ds.path.growth_optimizer_state": _GROWING,
    "raptr_ds.path.growth_warmup_steps": _GROWING,
    "raptr_ds.parallel.grow_micro_batch": Use(METHOD, ("raptr", "constant", "stacking")),
    "raptr_ds.model.rotary_base": Use(POSITION, ("rotary",)),
    "raptr_ds.objective.mask_rate": Use(ARCHITECTURE, ("bert",)),
    "raptr_ds.objective.whole_word": Use(ARCHITECTURE, ("bert",)),
    "raptr_ds.objective.denoisers": Use(ARCHITECTURE, ("ul2",)),
    **{f"zero_optimization.{key}": Use(STAGE, (3,)) for key in STAGE_3_ONLY},
}


_DECIDED_BY = {POSITION: ARCHITECTURE, SAMPLING: METHOD}
"""Selectors that get or lose their value by another one."""

RIVALS = (
    ("raptr_ds.path.full_warmup_steps", "raptr_ds.path.full_warmup_ratio"),
    ("scheduler.params.warmup_num_steps", "scheduler.params.warmup_ratio"),
    ("scheduler.params.decay_num_steps", "scheduler.params.decay_ratio"),
    ("optimizer.params.lr", "scheduler.params.warmup_max_lr"),
)
"""Two ways to say one thing."""


def selector_values(tree: dict[str, Any]) -> dict[str, Any]:
    """Return what each selector is in a run file's tree, defaults filled in; None where it cannot be told."""
    architecture = look_up(tree, ARCHITECTURE)
    method = look_up(tree, METHOD) or "full"
    sampling = look_up(tree, SAMPLING) if method in _RANDOM.values else None
    position = look_up(tree, POSITION) or {"bert": "learned", "ul2": "rotary"}.get(str(architecture))
    return {
        METHOD: method,
        SAMPLING: sampling or "uniform",
        ARCHITECTURE: architecture,
        POSITION: position,
        STAGE: look_up(tree, STAGE) or 0,
    }


def settle_unused(
    tree: dict[str, Any], touched: set[str], place: Callable[[str], str]
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Return the tree without keys that lost their use, the errors for keys that never had one, and lines to print.

    A key of the file that loses its use because --set changed its selector (another method on the same file) is
    dropped and said so. A key without use in any other case is an error. `touched` holds the keys set by --set.
    """
    selected, errors, notes = selector_values(tree), [], []
    for key, use in USED_ONLY.items():
        value = selected[use.selector]
        if look_up(tree, key) is None or value is None or value in use.values:
            continue
        changed = not touched.isdisjoint({use.selector, _DECIDED_BY.get(use.selector)})
        if changed and not is_touched(key, touched):
            tree = without(tree, key)
            notes.append(f"{key}: left out, as {use.selector}={value!r} (from --set) does not use it")
        else:
            wanted = " or ".join(repr(name) for name in use.values)
            errors.append(
                f"{key}={look_up(tree, key)!r}{place(key)} has no use with {use.selector}={value!r}: "
                f"it is for {wanted}. Remove it, or set {use.selector} to {wanted}."
            )
    return tree, errors, notes


def settle_overridden(tree: dict[str, Any], touched: set[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the tree without keys of the file that --set took the meaning from, and lines to print.

    These are parameters of the optimizer or schedule that another type, named by --set, does not have, and the other
    way of saying what --set says: --set of a warm-up in steps replaces the file's ratio.
    """
    notes = []
    for part, types in (("optimizer", OPTIMIZERS), ("scheduler", SCHEDULERS)):
        kind, params = canonical(look_up(tree, f"{part}.type"), types), look_up(tree, f"{part}.params")
        if f"{part}.type" not in touched or kind is None or not isinstance(params, dict):
            continue
        for key in [key for key in params if key not in types[kind] and f"{part}.params.{key}" not in touched]:
            tree = without(tree, f"{part}.params.{key}")
            notes.append(f"{part}.params.{key}: left out, as {part}.type={kind!r} (from --set) does not use it")
    for pair in RIVALS:
        said = [key for key in pair if look_up(tree, key) is not None]
        stays = [key for key in said if key in touched]
        if len(said) == 2 and len(stays) == 1:
            (gone,) = set(said) - set(stays)
            tree = without(tree, gone)
            notes.append(f"{gone}: left out, as {stays[0]} (from --set) says it")
    return tree, notes


def keep_used(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a complete tree without the keys that its selectors do not use."""
    selected = selector_values(tree)
    for key, use in USED_ONLY.items():
        if selected[use.selector] not in use.values:
            tree = without(tree, key)
    return tree


def look_up(tree: dict[str, Any], dotted: str) -> Any:
    """Return the value at a dotted key, None if there is none."""
    node: Any = tree
    for part in dotted.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def without(tree: dict[str, Any], dotted: str) -> dict[str, Any]:
    """Return a copy of `tree` without the value at a dotted key."""
    head, _, rest = dotted.partition(".")
    if head not in tree:
        return tree
    if not rest:
        return {key: value for key, value in tree.items() if key != head}
    return {**tree, head: without(tree[head], rest)}
