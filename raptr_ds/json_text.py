"""JSON that others may have written or damaged."""

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """Return what a JSON text holds. Raises: ValueError, also for text that is nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
