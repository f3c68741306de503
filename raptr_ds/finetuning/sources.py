"""Where a named task's data come from: a folder of the user's, a pip package, or the Hugging Face hub."""

from collections.abc import Callable
from pathlib import Path

from raptr_ds.errors import ConfigError, DataError
from raptr_ds.finetuning.examples import to_data
from raptr_ds.finetuning.packaged_tasks import PACKAGED_TASKS, read_packaged
from raptr_ds.finetuning.row_files import TRAIN, read_folder, read_hub
from raptr_ds.finetuning.task import Examples, Task
from raptr_ds.user_paths import is_folder


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
