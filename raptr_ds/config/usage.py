"""Which keys only some methods, architectures or ZeRO stages use: no key of a run file is ignored silently."""

from dataclasses import dataclass
from typing import Any

from raptr_ds.config.deepspeed_keys import STAGE_3_ONLY
from raptr_ds.config.optimization import OPTIMIZERS, SCHEDULERS, canonical
from raptr_ds.config.overrides import Place, is_touched
from raptr_ds.config.path_sections import METHODS, PATH_SECTIONS
from raptr_ds.config.sections import BY_ARCHITECTURE, keys_of

METHOD, ARCHITECTURE = "raptr_ds.path.method", "raptr_ds.model.architecture"
POSITION, STAGE = "raptr_ds.model.position_embedding", "zero_optimization.stage"
SAMPLING = "raptr_ds.path.sampling"


@dataclass(frozen=True)
class Use:
    """A key is used only where `selector` has one of `values`."""

    key: str
    selector: str
    values: tuple[str | int, ...]


USES = (
    *(
        Use(
            f"raptr_ds.path.{key}",
            METHOD,
            tuple(method for method, section in PATH_SECTIONS.items() if key in section.model_fields),
        )
        for key in keys_of("path")
    ),
    Use("raptr_ds.path.balance_stages", SAMPLING, ("balanced",)),
    Use("raptr_ds.parallel.micro_batches", METHOD, ("raptr", "constant", "stacking")),
    Use("raptr_ds.model.rotary_base", POSITION, ("rotary",)),
    Use("raptr_ds.objective.mask_rate", ARCHITECTURE, ("bert",)),
    Use("raptr_ds.objective.whole_word", ARCHITECTURE, ("bert",)),
    Use("raptr_ds.objective.denoisers", ARCHITECTURE, ("ul2",)),
    *(Use(f"zero_optimization.{key}", STAGE, (3,)) for key in STAGE_3_ONLY),
)

RIVALS = (
    ("raptr_ds.path.full_warmup_steps", "raptr_ds.path.full_warmup_ratio"),
    ("scheduler.params.warmup_num_steps", "scheduler.params.warmup_ratio"),
    ("scheduler.params.decay_num_steps", "scheduler.params.decay_ratio"),
    ("optimizer.params.lr", "scheduler.params.warmup_max_lr"),
)
"""Two ways to set one thing."""


def settle_unused(tree: dict[str, Any], touched: set[str], place: Place) -> tuple[dict[str, Any], list[str], list[str]]:
    """Return the tree without unused keys, the errors for keys that never had a use, and lines to print.

    A key of the file that loses its use because --set changed its selector (another method on the same file) is left
    out, and a line says so. A key without use in any other case is an error. `touched` holds the keys set by --set.
    """
    errors, notes = [], []
    for use, value, given in _unused(tree):
        tree = without(tree, use.key)
        # The architecture decides the position embedding where the file does not.
        selectors = {use.selector, ARCHITECTURE} if use.selector == POSITION else {use.selector}
        if selectors & touched and not is_touched(use.key, touched):
            notes.append(f"{use.key}: left out, as {use.selector}={value!r} (from --set) does not use it")
        else:
            wanted = " or ".join(map(repr, use.values))
            errors.append(
                f"{use.key}={given!r}{place(use.key)} has no use with {use.selector}={value!r}: "
                f"it is for {wanted}. Remove it, or set {use.selector} to {wanted}."
            )
    return tree, errors, notes


def keep_used(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a complete tree without the keys that its selectors do not use."""
    for use, _, _ in _unused(tree):
        tree = without(tree, use.key)
    return tree


def settle_overridden(tree: dict[str, Any], touched: set[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the tree without keys of the file that --set replaces, and lines to print.

    These are parameters of the optimizer or schedule that another type, named by --set, does not have, and the other
    way to set what --set sets: --set of a warm-up in steps replaces the file's ratio.
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
        given = [key for key in pair if look_up(tree, key) is not None]
        stays = [key for key in given if key in touched]
        if len(given) == 2 and len(stays) == 1:
            (gone,) = set(given) - set(stays)
            tree = without(tree, gone)
            notes.append(f"{gone}: left out, as {stays[0]} (from --set) replaces it")
    return tree, notes


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


def _unused(tree: dict[str, Any]) -> list[tuple[Use, Any, Any]]:
    """Return the uses that do not hold, each with its selector's value and its key's.

    A selector without a value, or with an unknown one, decides nothing: that is another error.
    """
    architecture, method = look_up(tree, ARCHITECTURE), look_up(tree, METHOD) or METHODS[0]
    selected = {
        METHOD: method if method in METHODS else None,
        SAMPLING: look_up(tree, SAMPLING) or "uniform",
        ARCHITECTURE: architecture,
        POSITION: look_up(tree, POSITION) or BY_ARCHITECTURE.get(str(architecture), {}).get("position_embedding"),
        STAGE: look_up(tree, STAGE) or 0,
    }
    unused: dict[str, tuple[Use, Any, Any]] = {}
    for use in USES:
        value, given = selected[use.selector], look_up(tree, use.key)
        if given is not None and value is not None and value not in use.values:
            unused.setdefault(use.key, (use, value, given))
    return list(unused.values())
