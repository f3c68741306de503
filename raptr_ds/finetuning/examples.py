"""Rows to examples: texts, labels and answers by the columns that a task names, each checked."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from decimal import Decimal
from typing import Any, TypeVar

from raptr_ds.errors import ConfigError, DataError
from raptr_ds.finetuning.task import Columns, Example, Examples, Row, Task, TaskData

T = TypeVar("T")
_HELD_OUT = 0.1
_OPTIONS = {"text": "--text-column", "pair": "--pair-column", "label": "--label-column"}


def to_data(
    task: Task,
    train: Sequence[Row],
    validation: Mapping[str, Sequence[Row]],
    where: Mapping[str, str],
    fraction: float | None = None,
) -> Examples:
    """Return the examples of rows. validation: by split, the first of which chooses the best model.

    where: how messages name each split, `train` included. fraction: of the training rows, held out where there is no
    other validation; 10% by default.
    Raises: DataError for rows that lack a column, a text or a label, and for labels that leave nothing to learn.
    """
    labels = task.labels or (_labels_of(task, train, where["train"]) if task.kind == "classification" else ())
    examples = to_examples(task, train, labels, where["train"])
    splits = {name: to_examples(task, rows, labels, where[name]) for name, rows in validation.items()}
    if not splits:
        share = _HELD_OUT if fraction is None else fraction
        examples, splits["validation"] = hold_out(examples, lambda one: (one.text, one.pair, one.choices), share)
    if task.kind in ("classification", "regression") and len({example.label for example in examples}) < 2:
        shown = labels[int(examples[0].label)] if labels else examples[0].label
        raise DataError(
            f"every training row of {where['train']} has the same label, {shown}: there is nothing to learn. Add rows "
            "of another, or name the column of the labels with --label-column."
        )
    if task.kind == "regression":
        for name, rows in splits.items():
            if len(rows) < 2:
                raise DataError(
                    f"{where.get(name, where['train'])} gives {len(rows)} row for validation, and a correlation needs "
                    "two at least. Add rows, or hold out more of them with --validation-fraction."
                )
    if task.kind == "multiple-choice":
        numbers = {len(example.choices) for rows in (examples, *splits.values()) for example in rows}
        if len(numbers) > 1:
            raise DataError(
                f"the rows of task {task.name} have {' or '.join(map(str, sorted(numbers)))} choices. Each row must "
                "have the same number."
            )
    return TaskData(examples, splits.pop(next(iter(splits))), labels, splits)


def to_examples(task: Task, rows: Iterable[Row], labels: Sequence[str], where: str) -> list[Example]:
    """Return the examples of rows. labels: the classes. Raises: as `to_data` does."""
    known = {label: index for index, label in enumerate(labels)}
    if task.labels:  # whose rows may have the numbers
        known |= {str(index): index for index in range(len(labels))}
    examples = []
    for number, row in enumerate(rows, 1):
        place = f"row {number} of {where}"
        try:
            rewritten = [row] if task.rewrite is None else list(task.rewrite(row))
        except (LookupError, TypeError, AttributeError) as error:
            raise DataError(
                f"{place} is not one of task {task.name} ({type(error).__name__}: {error}): it has "
                f"{', '.join(row)}. The columns must be those of {task.hub and task.hub[0]} on the hub."
            ) from error
        examples += [_example(task, one, known, place) for one in rewritten]
    if not examples:
        raise DataError(f"{where} has no rows.")
    return examples


def check_columns(columns: Columns, row: Row, where: str) -> None:
    """Raise DataError for a column that a row lacks, with those that it has."""
    named = (("text", columns.text), ("pair", columns.pair), ("label", columns.label))
    for role, name in (*named, *(("choices", name) for name in columns.choices)):
        if name is not None and name not in row:
            option = f" Name it with {_OPTIONS[role]}." if role in _OPTIONS else ""
            raise DataError(f"{where} has no column {name!r}: it has {', '.join(map(repr, row))}.{option}")


def _example(task: Task, row: Row, labels: dict[str, int], place: str) -> Example:
    columns = task.columns
    check_columns(columns, row, place)
    text = _text(row[columns.text], columns.text, place)
    pair = None if columns.pair is None else _text(row[columns.pair], columns.pair, place)
    if task.kind == "question-answering":
        return _question(text, pair or "", row[columns.label], place)
    choices = tuple(_choices(row, columns, place)) if task.kind == "multiple-choice" else ()
    label = _label(task, row[columns.label], labels, len(choices), place)
    if task.rewrite is None:
        return Example(text, pair, label, choices)
    choices = choices or tuple(row.get("choices", ()))
    return Example(text, pair, label, choices, row.get("group", ""), answers=tuple(row.get("answers", ())))


def _text(value: Any, column: str, place: str) -> str:
    if value is None or _is_nan(value) or isinstance(value, (dict, list)):
        raise DataError(f"{place} has {value!r} in column {column!r}, which must be a text.")
    text = str(value)
    if half := re.search("[\ud800-\udfff]", text):
        raise DataError(
            f"{place} has half of a surrogate pair, {half[0]!r}, in column {column!r}. It is no UTF-8: replace it."
        )
    return text


def _choices(row: Row, columns: Columns, place: str) -> Iterable[str]:
    values = [row[name] for name in columns.choices]
    texts = values[0] if len(values) == 1 else values
    if not isinstance(texts, (list, tuple)) or len(texts) < 2:
        raise DataError(f"{place} has {texts!r} as its choices, which must be a list of two texts at least.")
    named = zip(texts, columns.choices if len(values) > 1 else columns.choices * len(texts), strict=True)
    return (_text(text, name, place) for text, name in named)


def _label(task: Task, value: Any, labels: dict[str, int], num_choices: int, place: str) -> int | float:
    column = task.columns.label
    leaves_out = -1 if task.hub is not None and task.kind != "regression" else None  # by which the hub has no label
    if is_missing(value) or value == leaves_out:
        raise DataError(
            f"{place} has no label: its column {column!r} holds {value!r}. Every row needs one, in training and in "
            "validation; a test split without labels cannot measure anything."
        )
    if task.kind == "classification":
        if isinstance(value, (dict, list)):
            raise DataError(f"{place} has {value!r} in column {column!r}, which must be one label: a text or a number.")
        name = label_name(value)
        if name not in labels:
            raise DataError(
                f"{place} has the label {name!r}, which is none of the training data's: {', '.join(labels)}."
            )
        return labels[name]
    try:
        number = float(value)
        if task.kind == "regression" and abs(number) < float("inf"):
            return number
        if number.is_integer() and 0 <= number < num_choices:
            return int(number)
    except (TypeError, ValueError, OverflowError):
        pass
    wanted = "a finite number" if task.kind == "regression" else f"a whole number from 0 to {num_choices - 1}"
    raise DataError(f"{place} has {value!r} in column {column!r}, which must be {wanted} ({task.kind}).")


def is_missing(value: Any) -> bool:
    """Return whether a label is none: null, not a number (as pandas writes null), or an empty field."""
    return value is None or value == "" or _is_nan(value)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def label_name(value: Any) -> str:
    """Return the name of a class: a whole number without a point, whatever type it has."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _labels_of(task: Task, rows: Sequence[Row], where: str) -> tuple[str, ...]:
    """Return the classes that rows name: numbers in their order, others in the alphabet's."""
    check_columns(task.columns, rows[0], where)
    values = [row[task.columns.label] for row in rows if not is_missing(row.get(task.columns.label))]
    names = {label_name(value) for value in values}
    is_number = all(re.fullmatch(r"-?\d+", name) for name in names)
    return tuple(sorted(names, key=lambda name: (Decimal(name) if is_number else 0, name)))  # 1 and 01 are two


def _question(question: str, context: str, answers: Any, place: str) -> Example:
    try:
        texts, starts = list(answers["text"]), [int(start) for start in answers["answer_start"]]
        pairs = list(zip(texts, starts, strict=True))
    except (LookupError, TypeError, ValueError) as error:
        raise DataError(
            f"{place} has {str(answers)[:80]!r} as its answers, which must be as in SQuAD: "
            '{"text": [...], "answer_start": [...]}, with as many places (in characters) as texts.'
        ) from error
    for text, start in pairs:
        if not str(text).strip():
            raise DataError(f"{place} has a blank answer, {text!r}. A question without one has an empty list.")
        there = "" if start < 0 else context[start : start + len(str(text))]
        if text != there:
            raise DataError(f"{place} has the answer {text!r} at character {start}, where the text has {there!r}.")
    return Example(question, context, start=starts[0] if starts else 0, answers=tuple(texts))


def digest_of(data: Examples) -> str:
    """Return a digest of the labels, the further splits' names, and all examples, in their order."""
    digest = hashlib.blake2b(json.dumps([data.labels, list(data.also)]).encode(), digest_size=16)
    for examples in (data.train, data.validation, *data.also.values()):
        for example in examples:
            digest.update(json.dumps(asdict(example)).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def hold_out(items: Sequence[T], key: Callable[[T], Any], fraction: float) -> tuple[list[T], list[T]]:
    """Split items into training and validation, the same for the same items; those with equal keys stay together.

    Raises: ConfigError for a fraction that leaves nothing on one side.
    """
    keys = [hashlib.blake2b(repr(key(item)).encode(), digest_size=16).digest() for item in items]
    order = sorted(range(len(items)), key=keys.__getitem__)
    cut = max(1, round(len(items) * fraction))
    while cut < len(items) and keys[order[cut]] == keys[order[cut - 1]]:
        cut += 1
    if not 0 < fraction < 1 or cut >= len(items):
        raise ConfigError(
            f"--validation-fraction {fraction:g} of {len(items)} rows leaves nothing to train on. Give a fraction "
            "between 0 and 1, more rows, or a file with --validation."
        )
    held_out = set(order[:cut])
    return [one for i, one in enumerate(items) if i not in held_out], [items[i] for i in sorted(held_out)]
