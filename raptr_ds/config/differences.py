"""The values in which two complete run files differ."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from raptr_ds.config.sections import field_of
from raptr_ds.config.usage import without_harmless


def differences(
    there: Mapping[str, Any], here: Mapping[str, Any], ignored: Sequence[str]
) -> dict[str, tuple[Any, Any]]:
    """Return (there, here) by dotted key, of keys that begin with none of `ignored`; None for a value that is not set.

    there: as `RunConfig.resolved` gave it, of this version or of an earlier one that did not have all keys: it then ran
    with their defaults, and kept DeepSpeed keys that change nothing. here: as it gives it now.
    """
    old, new = leaves(without_harmless(dict(there))[0]), leaves(json.loads(json.dumps(here)))
    old = {key: _default_of(key) for key in new} | old
    keys = sorted(key for key in old.keys() | new.keys() if not key.startswith(tuple(ignored)))
    return {key: (old[key], new.get(key)) for key in keys if old[key] != new.get(key)}


def _default_of(key: str) -> Any:
    """Return the default of a dotted key of raptr_ds, as JSON has it; None where it has none."""
    field = field_of(key)
    default = None if field is None or field.is_required() else field.get_default(call_default_factory=True)
    return list(default) if isinstance(default, tuple) else default


def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values in nested objects by their dotted keys."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    inner = [leaves(value, f"{prefix}.{key}" if prefix else key) for key, value in tree.items()]
    return {key: value for found in inner for key, value in found.items()}
