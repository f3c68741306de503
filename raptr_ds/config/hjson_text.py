"""Reading HJSON: one file into one dictionary, with line and column for what cannot be read.

The limits of every value, in a run file and after --set, are here: 64-bit numbers, printable strings, bounded depth.
"""

import re
import sys
from pathlib import Path
from typing import Any

import hjson

from raptr_ds.errors import ConfigError
from raptr_ds.user_paths import is_file, read_error

MOST, MOST_FLOAT = 2**63 - 1, 1e38
"""Largest magnitude of a number."""

_ADVICE = (
    "Check brackets and quotes from there upwards; a string without quotes runs to the end of its line, brackets and "
    "commas included."
)
_MOST_DIGITS = 20
_MOST_DEPTH = 20


def read_hjson(file: Path) -> tuple[dict[str, Any], str]:
    """Return the object in `file` and the file's text.

    Raises: ConfigError if the file is missing, not UTF-8, not HJSON, not an object, or has a key twice.
    """
    if not is_file(file):
        raise ConfigError(_missing(file))
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise read_error(file, error) or ConfigError(f"run file {file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"run file {file} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    loaded = parse_hjson(text, str(file))
    if not isinstance(loaded, dict):
        raise ConfigError(f"{file} must hold one object {{...}}, as a DeepSpeed configuration does.")
    return loaded, text


def parse_hjson(text: str, source: str, advice: str = _ADVICE) -> Any:
    """Return the value that `text` writes, within the limits; `source` names it in errors. Raises: ConfigError."""

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
        loaded = hjson.loads(text, object_pairs_hook=unique, parse_int=whole_number, parse_float=_finite)
    except hjson.HjsonDecodeError as error:
        raise ConfigError(f"{source}, line {error.lineno} column {error.colno}: {error.msg}. {advice}") from error
    except RecursionError as error:
        raise ConfigError(_too_deep(source)) from error
    check_limits(loaded, source, text)
    return loaded


def whole_number(digits: str) -> int | float:
    """Return the integer that is written, or for one of too many digits a float that check_limits refuses."""
    return int(digits) if len(digits) <= _MOST_DIGITS else _finite(digits)


def _finite(digits: str) -> float:
    # hjson makes integers of floats, which infinity cannot be.
    return min(max(float(digits), -sys.float_info.max), sys.float_info.max)


def check_limits(value: Any, source: str, text: str = "", key: str = "", depth: int = 0) -> None:
    """Raise ConfigError for a number, string or depth that no run can use. text: where keys have their lines."""
    if depth > _MOST_DEPTH:
        raise ConfigError(_too_deep(source))
    if isinstance(value, dict):
        for name, inner in value.items():
            dotted = f"{key}.{name}" if key else str(name)
            check_limits(name, source, text, dotted, depth + 1)
            check_limits(inner, source, text, dotted, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            check_limits(inner, source, text, key, depth + 1)
    elif isinstance(value, int | float) and not abs(value) <= (MOST if isinstance(value, int) else MOST_FLOAT):
        much = f"{value:.3g}" if abs(value) < sys.float_info.max else "beyond floating point"
        raise ConfigError(
            f"{_place(source, text, key)} has a number that is too large ({much}): integers are at most {MOST:.3g}, "
            f"other numbers {MOST_FLOAT:.0e}. Write a smaller one."
        )
    elif isinstance(value, str) and (bad := re.search("[\\0\ud800-\udfff]", value)):
        raise ConfigError(
            f"{_place(source, text, key)} has a string with the character {bad.group()!a}, which no name or path "
            "can hold. Remove it."
        )


def line_of(text: str, dotted: str) -> int | None:
    """Return the line, from 1, where the last part of a dotted key is written; None if not there exactly once.

    A key that has dots itself is found too.
    """
    parts = dotted.split(".")
    suffixes = (".".join(parts[start:]) for start in reversed(range(len(parts))))
    lines = next((lines for suffix in suffixes if (lines := key_lines(text, suffix))), [])
    return lines[0] if len(lines) == 1 else None


def key_lines(text: str, key: str) -> list[int]:
    """Return the lines, from 1, where `key` is written as a key."""
    pattern = re.compile(rf"""(?:^|[{{,])\s*["']?{re.escape(key)}["']?\s*:""")
    return [number for number, line in enumerate(text.splitlines(), 1) if pattern.search(line)]


def _lines(text: str, key: str) -> str:
    numbers = key_lines(text, key)
    return f"line {numbers[0]}" if len(numbers) == 1 else f"see lines {', '.join(map(str, numbers))}"


def _place(source: str, text: str, key: str) -> str:
    """Return the source with its line, if the key is written once in it, and the key, in printable characters."""
    line = line_of(text, key)
    return f"{source}{f', line {line}' if line else ''}{f': {ascii(key)[1:-1]}' if key else ''}"


def _too_deep(source: str) -> str:
    return (
        f"{source}: lists and objects are nested more than {_MOST_DEPTH} deep; no key of a run needs that. "
        "Check the brackets, and remove what is nested."
    )


def _missing(file: Path) -> str:
    folder = file.parent
    try:
        beside = sorted(path.name for path in folder.iterdir() if path.suffix in {".json", ".hjson"})
    except OSError:  # no such folder, or one that may be entered but not listed
        beside = []
    where = f" {folder} holds: {', '.join(beside)}." if beside else ""
    return f"run file {file} does not exist or is not a file. Name one that does.{where}"
