"""Sweeps: the settings of each run of a Slurm array, and the folder that it works in."""

import hashlib
import json
import re
import shlex
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from raptr_ds.errors import ConfigError
from raptr_ds.user_paths import is_file

_MAX_NAME = 100
_MAX_RUNS = 1000


def sweep(words: Sequence[str], folder: Path) -> list[list[str]]:
    """Return the settings of each run of --array, its own folder, inside that of the sweep, among them.

    words: a file with a run's settings in each line, or KEY=V1,V2 of which all combinations are run.
    Raises: ConfigError.
    """
    if len(words) == 1 and is_file(words[0]):
        settings = _lines_of(Path(words[0]))
    else:
        settings = [tuple(point) for point in product(*(_values_of(word) for word in words))]
    if not 1 <= len(settings) <= _MAX_RUNS:
        raise ConfigError(f"--array makes {len(settings)} runs; a sweep has 1 to {_MAX_RUNS}.")
    for setting in (setting for point in settings for setting in point):
        if setting.partition("=")[0].strip() in {"raptr_ds.train.save", "raptr_ds.train", "raptr_ds"}:
            raise ConfigError(
                f"--array {setting!r}: each run's folder is made inside raptr_ds.train.save. Set that by --set."
            )
    if len(set(settings)) < len(settings):
        twice = " ".join(next(point for point in settings if settings.count(point) > 1))
        raise ConfigError(f"--array has two runs with the settings {twice}. Give each run settings of its own.")
    plain = [_name_of(point) for point in settings]
    shared = {name for name in plain if plain.count(name) > 1}  # such as a.x=1 and b.x=1
    names = [_name_of(point, name in shared) for point, name in zip(settings, plain, strict=True)]
    return [
        [*point, f"raptr_ds.train.save={json.dumps(str(folder / name))}"]
        for point, name in zip(settings, names, strict=True)
    ]


def _lines_of(file: Path) -> list[tuple[str, ...]]:
    try:
        lines = [shlex.split(line, comments=True) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a quote without its other
        raise ConfigError(f"--array {file} cannot be read: {error}. Each line holds the settings of a run.") from error
    for word in (word for line in lines for word in line):
        if not word.partition("=")[1]:
            raise ConfigError(f"--array {file}: {word!r} is not KEY=VALUE. Each line holds the settings of a run.")
    return [tuple(line) for line in lines if line]


def _values_of(word: str) -> list[str]:
    key, equals, values = word.partition("=")
    if not equals or not key or not all(values.split(",")):
        raise ConfigError(
            f"--array {word!r} is neither a file nor KEY=V1,V2. Write --array optimizer.params.lr=1e-4,2e-4, or name a "
            "file with the settings of a run in each line."
        )
    if values[0] in "[{":
        raise ConfigError(
            f"--array {word!r}: lists and objects have commas of their own. Put each run's settings in a file."
        )
    return [f"{key}={value}" for value in values.split(",")]


def _name_of(settings: Sequence[str], has_digest: bool = False) -> str:
    """Return a folder's name: the settings, or their beginning and a digest where they have other characters."""
    plain = ",".join(
        f"{key.rpartition('.')[2]}={value}" for key, _, value in (word.partition("=") for word in settings)
    )
    name = re.sub(r"[^\w.,=+-]", "_", plain, flags=re.ASCII).lstrip(".-")[:_MAX_NAME]
    keys = [word.partition("=")[0].rpartition(".")[2] for word in settings]
    if not has_digest and name == plain and len(set(keys)) == len(keys):
        return name
    return f"{name}-{hashlib.sha256(chr(0).join(settings).encode(errors='surrogateescape')).hexdigest()[:8]}"
