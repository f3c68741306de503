"""Reading HJSON: one file into one dictionary, with line and column for what cannot be read."""

import re
from pathlib import Path
from typing import Any

import hjson

from raptr_ds.errors import ConfigError
from raptr_ds.user_paths import is_file


def read_hjson(file: Path) -> tuple[dict[str, Any], str]:
    """Return the object in `file` and the file's text.

    Raises: ConfigError if the file is missing, not UTF-8, not HJSON, not an object, or has a key twice.
    """
    if not is_file(file):
        raise ConfigError(_missing(file))
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"run file {file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"run file {file} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    return parse_hjson(text, str(file)), text


def parse_hjson(text: str, source: str) -> dict[str, Any]:
    """Return the object that `text` holds; `source` names it in errors. Raises: ConfigError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise ConfigError(
                    f"{source}: the key {key!r} is written twice in one object ({_lines(text, key)}). Keep one of them."
                )
            seen[key] = value
        return seen

    try:
        loaded = hjson.loads(text, object_pairs_hook=unique)
    except hjson.HjsonDecodeError as error:
        raise ConfigError(
            f"{source}, line {error.lineno} column {error.colno}: {error.msg}. Check brackets and quotes from there "
            "upwards; a string without quotes runs to the end of its line, brackets and commas included."
        ) from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{source} must hold one object {{...}}, as a DeepSpeed configuration does.")
    return loaded


def line_of(text: str, dotted: str) -> int | None:
    """Return the line, from 1, where the last part of a dotted key is written; None if not there exactly once."""
    lines = key_lines(text, dotted.rpartition(".")[2])
    return lines[0] if len(lines) == 1 else None


def key_lines(text: str, key: str) -> list[int]:
    """Return the lines, from 1, where `key` is written as a key."""
    pattern = re.compile(rf"""(?:^|[{{,])\s*["']?{re.escape(key)}["']?\s*:""")
    return [number for number, line in enumerate(text.splitlines(), 1) if pattern.search(line)]


def _lines(text: str, key: str) -> str:
    numbers = key_lines(text, key)
    return f"line {numbers[0]}" if len(numbers) == 1 else f"see lines {', '.join(map(str, numbers))}"


def _missing(file: Path) -> str:
    folder = file.parent
    try:
        beside = sorted(path.name for path in folder.iterdir() if path.suffix in {".json", ".hjson"})
    except OSError:  # no such folder, or one that may be entered but not listed
        beside = []
    where = f" {folder} holds: {', '.join(beside)}." if beside else ""
    return f"run file {file} does not exist or is not a file. Give --deepspeed_config one that does.{where}"
