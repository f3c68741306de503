"""`--set KEY=VALUE`: dotted keys of the run file, changed from the command line."""

import copy
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from raptr_ds.config.hjson_text import check_limits, parse_hjson, whole_number
from raptr_ds.errors import ConfigError

Place = Callable[[str], str]
"""Returns where a dotted key was written, in parentheses, for messages; empty if that is not known."""


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], set[str]]:
    """Return a copy of `tree` with the overrides in it, and the dotted keys of every value that they set.

    Later overrides win over earlier ones. Whether a key exists at all is checked with the rest of the file.
    Raises: ConfigError if an override is not KEY=VALUE or goes through something that is no section.
    """
    tree = copy.deepcopy(tree)
    touched: set[str] = set()
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise ConfigError(
                f"--set {override!r} is not KEY=VALUE with a dotted key of the run file. "
                "Write it as: --set raptr_ds.train.steps=100 zero_optimization.stage=1"
            )
        value = parse_value(text.strip(), key)
        _assign(tree, parts, value)
        check_limits(tree, f"--set {key[:80]}")
        touched.update(_leaves(key.strip(), value))
    return tree, touched


def parse_value(text: str, key: str = "value") -> Any:
    """Return the JSON scalar, HJSON list or object, or else the plain string that `text` writes.

    `6-8-10-12` stays a string, `1e-3` is a number, `null` removes a key. Raises: ConfigError.
    """
    if text[:1] in {"[", "{"}:
        advice = f"Quote it for the shell as one word, and strings inside it with double quotes: --set '{key}=[1, 2]'"
        return parse_hjson(text, f"--set {key}", advice)
    try:
        value = json.loads(text, parse_constant=str, parse_int=whole_number)
    except json.JSONDecodeError:
        value = text
    check_limits(value, f"--set {key}")
    return value


def write_value(value: Any) -> str:
    """Return the text that `parse_value` reads as a JSON value: a string as it is, unless that would be another value.

    It has one line.
    """
    if not isinstance(value, str) or len(value.splitlines()) > 1 or value != value.strip() or value[:1] in {"[", "{"}:
        return json.dumps(value)
    try:
        json.loads(value, parse_constant=str, parse_int=str)
    except json.JSONDecodeError:
        return value
    return json.dumps(value)


def is_touched(dotted: str, touched: Iterable[str]) -> bool:
    """Return whether overrides set the value at a dotted key or anything below it."""
    return any(key == dotted or key.startswith(f"{dotted}.") for key in touched)


def _assign(tree: dict[str, Any], parts: list[str], value: Any) -> None:
    node = tree
    for depth, part in enumerate(parts[:-1], 1):
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            outer = ".".join(parts[:depth])
            raise ConfigError(
                f"--set {'.'.join(parts)}: {outer} is the value {node!r}, not a section, so there is nothing "
                f"below it to set. Set {outer} itself."
            )
    node[parts[-1]] = value


def _leaves(key: str, value: Any) -> Iterable[str]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}", inner)
    yield key
