"""Rows from a user's files: JSON lines, CSV and TSV, and folders of the datasets library."""

import csv
import io
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raptr_ds.errors import ConfigError, DataError
from raptr_ds.finetuning.task import Row
from raptr_ds.json_text import parse_json
from raptr_ds.user_paths import is_file, is_folder

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
TRAIN = "train"
_TABLES: dict[str, dict[str, Any]] = {
    ".csv": {"delimiter": ","},
    ".tsv": {"delimiter": "\t", "quoting": csv.QUOTE_NONE},  # a quotation mark is text, as in GLUE's
}
_LIBRARY = "pip install '.[finetuning]'"


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file. Raises: DataError for what cannot be read, with its line."""
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise ConfigError(f"{path} must end in {', '.join(ENDINGS)}, which says how it is read.")
    if not is_file(path):
        raise DataError(f"{path}: there is no such file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}. Convert it.") from error
    rows = list(_tables(path, text) if ending in _TABLES else _objects(path, text))
    if not rows:
        raise DataError(f"{path} has no rows.")
    return rows


def _objects(path: Path, text: str) -> Iterator[Row]:
    """Yield the objects of JSON lines, or of one JSON array."""
    if text.lstrip().startswith("["):
        found = ((f", row {number}", row) for number, row in enumerate(_parsed(path, text, ""), 1))
    else:
        lines = ((f", line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
        found = ((place, _parsed(path, line, place)) for place, line in lines)
    for place, row in found:
        if not isinstance(row, dict):
            raise DataError(f"{path}{place} is {str(row)[:60]!r}, and must be a JSON object.")
        yield row


def _parsed(path: Path, text: str, place: str) -> Any:
    try:
        return parse_json(text, keys_once=True)
    except ValueError as error:
        raise DataError(f"{path}{place} cannot be read as JSON: {error}.") from error


def _tables(path: Path, text: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    ending = path.suffix.lower()
    lines = csv.DictReader(io.StringIO(text, newline=""), strict=True, **_TABLES[ending])
    try:
        if twice := [name for name, count in Counter(lines.fieldnames or ()).items() if count > 1]:
            raise DataError(f"{path} names the column {twice[0]!r} twice in its first line. Rename or remove one.")
        for row in lines:
            if None in row or None in row.values():
                fix = "Quote fields that hold commas." if ending == ".csv" else "A field cannot hold a tab."
                raise DataError(
                    f"{path}, line {lines.line_num} has another number of fields than the first line, which names "
                    f"{', '.join(lines.fieldnames or ())}. {fix}"
                )
            yield row
    except csv.Error as error:
        raise DataError(f"{path}, line {lines.line_num} is no CSV: {error}.") from error


def read_folder(folder: Path) -> dict[str, list[Row]]:
    """Return the splits of a folder that the datasets library saved (save_to_disk); a lone one is `train`.

    Raises: DataError if it is none, ConfigError without the library.
    """
    library = _datasets()
    if not is_folder(folder):
        raise DataError(f"{folder}: there is no such folder.")
    try:
        found = library.load_from_disk(str(folder))
    except Exception as error:  # the library raises what the damage happens to lead to
        raise DataError(
            f"{folder} cannot be read as a folder of the datasets library ({error}). Name one that save_to_disk wrote."
        ) from error
    return _splits(found)


def read_hub(name: str, configuration: str | None) -> dict[str, list[Row]]:
    """Return the splits of a dataset on the Hugging Face hub, from its cache where it is there.

    Raises: DataError if it cannot be fetched, ConfigError without the library.
    """
    library = _datasets()
    try:
        return _splits(library.load_dataset(name, configuration))
    except Exception as error:  # of the network, of the hub, of a changed dataset
        arguments = repr(name) if configuration is None else f"{name!r}, {configuration!r}"
        raise DataError(
            f"the dataset {name} cannot be fetched from the Hugging Face hub ({str(error).splitlines()[0][:200]}). "
            f'Where the hub can be reached, write it into a folder: python -c "import datasets; '
            f"datasets.load_dataset({arguments}).save_to_disk('FOLDER')\", and name that with --data FOLDER."
        ) from error


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"the datasets library is not installed ({error}): {_LIBRARY}.") from error
    datasets.disable_progress_bars()
    return datasets


def _splits(found: Any) -> dict[str, list[Row]]:
    splits = found if isinstance(found, dict) else {TRAIN: found}
    return {name: list(split) for name, split in splits.items()}
