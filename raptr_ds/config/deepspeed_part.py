"""The DeepSpeed part of a run file: every key is one that our engines honour, every value one that DeepSpeed takes."""

from collections.abc import Callable
from typing import Any

from raptr_ds.config.deepspeed_keys import KNOWN, REFUSED, Table
from raptr_ds.config.sections import SECTIONS, keys_of
from raptr_ds.errors import nearest

BLOCK = "raptr_ds"
_FREE = {"optimizer.params", "scheduler.params"}


def check_deepspeed_part(tree: dict[str, Any], place: Callable[[str], str]) -> list[str]:
    """Return one message for each key that is unknown or not offered, and each value out of range.

    place: returns where a dotted key was written, in parentheses, for the messages. Optimizer and scheduler
    parameters are checked by their own types, elsewhere.
    """
    part = {key: value for key, value in tree.items() if key != BLOCK}
    return _check_table(part, KNOWN, "", place)


def _check_table(part: dict[str, Any], table: Table, prefix: str, place: Callable[[str], str]) -> list[str]:
    errors = []
    for key, value in part.items():
        dotted = f"{prefix}{key}"
        known = table.get(key)
        if dotted in REFUSED:
            errors.append(f"{dotted}{place(dotted)} {REFUSED[dotted]}.")
        elif known is None:
            errors.append(unknown_key(dotted, [*table, BLOCK] if not prefix else list(table), place))
        elif not isinstance(known, dict):
            if must := known(value):
                errors.append(f"{dotted}={value!r}{place(dotted)} {must}.")
        elif not isinstance(value, dict):
            example = next(iter(known), "type")
            errors.append(f"{dotted}={value!r}{place(dotted)} must be an object, as {{{example!r}: ...}}.")
        elif dotted not in _FREE:
            errors += _check_table(value, known, f"{dotted}.", place)
    return errors


def unknown_key(dotted: str, known: list[str], place: Callable[[str], str]) -> str:
    """Return the message for a key that does not exist: its section, the nearest name, and all names there."""
    section, _, name = dotted.rpartition(".")
    elsewhere = _elsewhere(name, section)
    guess = nearest(name, known) or elsewhere + "."
    listed = "" if elsewhere else f" Keys {f'of {section}' if section else 'there'}: {', '.join(known)}."
    return f"{dotted}{place(dotted)} is an unknown key{guess} Correct or remove it.{listed}"


def _elsewhere(name: str, section: str) -> str:
    """Say where a name does exist, for a key that was put into the wrong section."""
    if name in SECTIONS and section != BLOCK:
        return f"; it belongs into {BLOCK}: {BLOCK}.{name}"
    for title in SECTIONS:
        if name in keys_of(title) and f"{BLOCK}.{title}" != section:
            return f"; it belongs to {BLOCK}.{title}"
    if name in KNOWN and section:
        return "; it belongs to the top level, beside raptr_ds"
    return ""
