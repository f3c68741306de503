"""JSON that others may have written or damaged."""

import json
from typing import Any


def parse_json(text: str | bytes, keys_once: bool = False) -> Any:
    """Return what a JSON text holds. keys_once: refuse an object with a key that stands twice, whose last value counts.

    Raises: ValueError, also for text that is nested too deeply to be read.
    """
    try:
        return json.loads(text, object_pairs_hook=_with_keys_once if keys_once else None)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _with_keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands twice in one object")
        found[key] = value
    return found
