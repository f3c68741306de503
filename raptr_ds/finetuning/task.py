"""What a task is: its kind, its columns, its metrics, and the recipe that it is trained by."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar, get_args

Kind = Literal["classification", "regression", "multiple-choice", "question-answering"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Row = Mapping[str, Any]
Rewrite = Callable[[Row], Iterator[Row]]
Part = TypeVar("Part")
Other = TypeVar("Other")


@dataclass(frozen=True)
class Recipe:
    """How a task is trained. batch_size: sequences of one optimizer step, over all processes.

    weight_decay: as torch's AdamW has it, which multiplies it by the learning rate.
    """

    epochs: float = 3
    batch_size: int = 32
    learning_rate: float = 5e-5
    weight_decay: float = 0.1
    seeds: int = 3


@dataclass(frozen=True)
class Columns:
    """Names of a row's columns. pair: None where there is one text; choices: where a row has the choices' texts."""

    text: str = "text"
    pair: str | None = None
    label: str = "label"
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Example:
    """A row of a task.

    label: a class, a right choice (both from 0), or a score. group: what is judged together, such as the answers to
    one question. start, answers: of question answering, the first answer's place in `pair`, in characters, and all
    texts that count as right; a question without any has no answer.
    """

    text: str
    pair: str | None = None
    label: int | float = 0
    choices: tuple[str, ...] = ()
    group: str = ""
    start: int = 0
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A task. metrics: whose mean is the score that chooses the best model.

    hub: dataset and configuration on the Hugging Face hub. labels: names of the classes, empty where the training data
    say which there are. validation: the split that chooses the best model; also: splits that are measured at the end.
    starts_from: the task whose model this one conventionally starts from. rewrite: makes rows with `columns` of the
    dataset's own. judged: by examples, or by groups of them (`measure`).
    """

    name: str
    kind: Kind
    metrics: tuple[str, ...]
    columns: Columns
    recipe: Recipe = Recipe()
    labels: tuple[str, ...] = ()
    hub: tuple[str, str | None] | None = None
    validation: str = "validation"
    also: tuple[str, ...] = ()
    starts_from: str | None = None
    rewrite: Rewrite | None = None
    judged: Literal["examples", "answer sets", "candidates"] = "examples"


@dataclass(frozen=True)
class TaskData(Generic[Part]):
    """The splits of a task, each a list of examples, or their features.

    labels: names of the classes; also: further validation splits, by name.
    """

    train: Part
    validation: Part
    labels: tuple[str, ...] = ()
    also: Mapping[str, Part] = field(default_factory=dict)

    def map(self, change: Callable[[Part], Other]) -> "TaskData[Other]":
        """Return the same of every split changed."""
        also = {name: change(part) for name, part in self.also.items()}
        return TaskData(change(self.train), change(self.validation), self.labels, also)


Examples = TaskData[list[Example]]
