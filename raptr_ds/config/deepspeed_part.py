"""The DeepSpeed part of a run file: every key is one that our engines honour, every value one that DeepSpeed takes."""

from collections.abc import Iterable, Mapping
from typing import Any

from raptr_ds.config.batch import BATCH_KEYS
from raptr_ds.config.deepspeed_keys import ELSEWHERE_NAMES, INSTEAD, KNOWN, OFF_BY_DEFAULT, Check, Table
from raptr_ds.config.overrides import Place
from raptr_ds.config.sections import BLOCK, SECTIONS, keys_of
from raptr_ds.errors import nearest

_FREE = {"optimizer.params", "scheduler.params"}
_UNSUPPORTED = "is not supported by raptr_ds"


def check_table(part: dict[str, Any], table: Table | Mapping[str, Check], prefix: str, place: Place) -> list[str]:
    """Return one message for each wrong key or value of an object. prefix: its dotted name with a dot, or empty."""
    errors = []
    for key, value in part.items():
        dotted = f"{prefix}{key}"
        known = table.get(key)
        if known is None:
            errors.append(unknown_key(prefix, key, table if prefix else [*table, BLOCK], place, _UNSUPPORTED))
        elif value == "auto" and (isinstance(known, dict) or known(value)):
            errors.append(auto_value(dotted, place, known(value) if callable(known) else "must be an object"))
        elif not isinstance(known, dict):
            if must := known(value):
                errors.append(f"{dotted}={value!r}{place(dotted)} {must}.")
        elif not isinstance(value, dict):
            example = next(iter(known), "type")
            errors.append(f"{dotted}={value!r}{place(dotted)} must be an object, as {{{example!r}: ...}}.")
        elif dotted not in _FREE:
            wrong = check_table(value, known, f"{dotted}.", place)
            if not wrong and value and dotted in OFF_BY_DEFAULT and "enabled" not in value:
                wrong = [
                    f"{dotted}={value!r}{place(dotted)} has no use without {dotted}.enabled, which is false by "
                    f"default. Set {dotted}.enabled to true, or to false to keep the rest for later, or remove "
                    f"{dotted}."
                ]
            errors += wrong
    return errors


def auto_value(dotted: str, place: Place, must: str | None) -> str:
    """Return the message for Hugging Face's value `auto`, which its Trainer replaces."""
    fix = "Write a number of sequences" if dotted in BATCH_KEYS[:2] else "Write a value, or remove it for its default"
    if dotted.endswith(".type"):
        fix = "Write one of them"
    return (
        f"{dotted}='auto'{place(dotted)} is a value that Hugging Face's Trainer fills in from its own arguments; "
        f"raptr_ds has none, and it {must}. {fix}."
    )


def unknown_key(prefix: str, name: str, known: Iterable[str], place: Place, what: str = "is an unknown key") -> str:
    """Return the message for a key that is not known: what to use instead, or the nearest name and all names there.

    prefix: the dotted name of the object, with a dot, or empty.
    """
    section, dotted = prefix.rstrip("."), f"{prefix}{name}"
    if "." in name:
        *outer, last = name.split(".")
        nested = "".join(f'"{part}": {{' for part in outer) + f'"{last}": ...' + "}" * len(outer)
        return (
            f"{name!r}{place(dotted)}{f' in {section}' if section else ''} is one key with dots in it: dotted keys are "
            f"for --set. In a file objects are nested: write {nested}."
        )
    if dotted in INSTEAD:
        return f"{dotted}{place(dotted)} {_UNSUPPORTED}. {INSTEAD[dotted]}."
    if ELSEWHERE_NAMES.get(name, dotted) != dotted:
        return f"{dotted}{place(dotted)} {what}. Its name here is {ELSEWHERE_NAMES[name]}: move it there."
    elsewhere = _elsewhere(name, section)
    guess = nearest(name, known) or elsewhere + "."
    listed = "" if elsewhere else f" Keys {f'of {section}' if section else 'there'}: {', '.join(known)}."
    return f"{dotted}{place(dotted)} {what}{guess} Correct or remove it.{listed}"


def _elsewhere(name: str, section: str) -> str:
    """Return where a name does exist, for a key in the wrong section; an empty string for no such place."""
    if name in SECTIONS and section != BLOCK:
        return f"; it belongs in {BLOCK}: {BLOCK}.{name}"
    for title in SECTIONS:
        if name in keys_of(title) and f"{BLOCK}.{title}" != section:
            return f"; it belongs to {BLOCK}.{title}"
    if name in KNOWN and section:
        return "; it belongs to the top level, beside raptr_ds"
    return ""
