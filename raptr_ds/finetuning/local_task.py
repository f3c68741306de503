"""A task from a user's own files: which of its columns are what, and of which kind it is."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from raptr_ds.errors import ConfigError, DataError
from raptr_ds.finetuning.examples import check_columns, is_missing, to_data
from raptr_ds.finetuning.row_files import TRAIN, read_folder, read_rows
from raptr_ds.finetuning.task import Columns, Examples, Kind, Recipe, Row, Task
from raptr_ds.user_paths import is_folder

_TEXTS = ("sentence1", "sentence", "text", "premise", "question", "goal", "context")
_PAIRS = ("sentence2", "hypothesis")
_LABELS = ("label", "labels", "score")
_METRICS: dict[Kind, tuple[str, ...]] = {
    "classification": ("accuracy",),
    "regression": ("pearson", "spearmanr"),
    "multiple-choice": ("accuracy",),
    "question-answering": ("f1",),
}


@dataclass(frozen=True)
class LocalOptions:
    """What the user says of own files; None is found out. fraction: of the rows, held out."""

    kind: Kind | None = None
    text: str | None = None
    pair: str | None = None
    label: str | None = None
    validation: Path | None = None
    fraction: float | None = None


def load_local(path: Path, options: LocalOptions) -> tuple[Task, Examples]:
    """Return the task in a file, or in a folder that the datasets library saved.

    Raises: ConfigError or DataError for what cannot be read, is not there, or fits no kind of task.
    """
    splits = read_folder(path) if is_folder(path) else {TRAIN: read_rows(path)}
    if TRAIN not in splits:
        raise DataError(f"{path} has no split {TRAIN!r}: it has {', '.join(splits)}.")
    train = splits[TRAIN]
    columns, kind = _columns(train[0], str(path), options)
    check_columns(columns, train[0], str(path))
    if kind is None:
        kind = "regression" if _is_score(train, columns.label) else "classification"
    task = Task(path.stem, kind, _METRICS[kind], columns, Recipe())
    where, validation = {TRAIN: str(path)}, {}
    if options.validation is not None:
        validation["validation"] = read_rows(options.validation)
        where["validation"] = str(options.validation)
    elif "validation" in splits:
        validation["validation"] = splits["validation"]
        where = {name: f"{path}, split {name}" for name in (TRAIN, "validation")}
    for name, rows in validation.items():
        check_columns(columns, rows[0], where[name])
    if validation and options.fraction is not None:
        raise ConfigError(
            f"--validation-fraction holds rows of {path} out, and {where['validation']} is there for validation. Leave "
            "it out."
        )
    return task, to_data(task, train, validation, where, options.fraction)


def _columns(row: Row, where: str, options: LocalOptions) -> tuple[Columns, Kind | None]:
    names = list(row)
    kind = options.kind
    if kind is None and {"context", "answers"} <= set(names):
        kind = "question-answering"
    choices = ("choices",) if "choices" in names else _numbered(names)
    if kind is None and choices:
        kind = "multiple-choice"
    if kind == "question-answering":
        found = Columns("question", "context", "answers")
    else:
        text = options.text or _first(_TEXTS, names, "text", where)
        label = options.label or _first(_LABELS, names, "label", where)
        found = Columns(text, next((name for name in _PAIRS if name in names and options.text is None), None), label)
    if kind == "multiple-choice":
        if not choices:
            raise DataError(
                f"{where} has no column 'choices' (a list of texts), nor choice1, choice2, ...: it has "
                f"{', '.join(map(repr, names))}."
            )
        if options.pair:
            raise ConfigError("--pair-column does not go with multiple choice: the choices are the other texts.")
        found = replace(found, pair=None, choices=choices)
    given = {"text": options.text, "pair": options.pair, "label": options.label}
    return replace(found, **{role: name for role, name in given.items() if name}), kind


def _numbered(names: Sequence[str]) -> tuple[str, ...]:
    """Return choice1, choice2, ... or ending0, ending1, ... (as SWAG has them)."""
    for stem in ("choice", "ending"):
        found = [name for name in names if name.removeprefix(stem).isdecimal() and name.startswith(stem)]
        if len(found) > 1:
            return tuple(sorted(found, key=lambda name: int(name.removeprefix(stem))))
    return ()


def _first(known: Sequence[str], names: Sequence[str], role: str, where: str) -> str:
    for name in known:
        if name in names:
            return name
    raise DataError(
        f"{where} has no column {' or '.join(map(repr, known))}: it has {', '.join(map(repr, names))}. Name the column "
        f"of the {role} with --{role}-column."
    )


def _is_score(rows: Sequence[Row], column: str) -> bool:
    """Return whether labels are numbers, and some of them no whole ones: 0.5, or "3.0" in a CSV file."""
    values = [row.get(column) for row in rows if not is_missing(row.get(column))]
    try:
        numbers = [float(value) for value in values if not isinstance(value, bool)]  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return False
    has_point = any(isinstance(value, float) or (isinstance(value, str) and "." in value) for value in values)
    return len(numbers) == len(values) > 0 and has_point
