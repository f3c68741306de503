"""Tasks by name: GLUE, SuperGLUE, SQuAD, and those whose data pip packages carry.

The recipes of GLUE are MosaicBERT's (Portes et al. 2023, examples/benchmarks/bert in mosaicml/examples), those of
SuperGLUE, and MNLI's epochs and batch, ModernBERT's (Warner et al. 2024). Their weight decay is decoupled from the
learning rate; it is divided by it here, since torch's AdamW multiplies by it. WSC, ReCoRD and what follows SQuAD have
none there: those recipes are common ones.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from raptr_ds.errors import ConfigError, nearest
from raptr_ds.finetuning.task import Columns, Recipe, Rewrite, Row, Task

_NO_YES = ("False", "True")
_NLI = ("entailment", "neutral", "contradiction")
_PAIR = Columns("text", "pair")
_CHOICE = Columns("text", choices=("choices",))
_COPA_QUESTIONS = {"cause": "What was the cause of this?", "effect": "What happened as a result?"}


def _glue(name: str, metrics: tuple[str, ...], text: str, pair: str | None, recipe: Recipe, *labels: str) -> Task:
    kind = "classification" if labels else "regression"
    start = "mnli" if name in ("rte", "mrpc", "stsb") else None
    return Task(name, kind, metrics, Columns(text, pair), recipe, labels, ("nyu-mll/glue", name), starts_from=start)


_GLUE = (
    replace(
        _glue("mnli", ("accuracy",), "premise", "hypothesis", Recipe(2, 64, 5e-5, 0.1, seeds=1), *_NLI),
        validation="validation_matched",
        also=("validation_mismatched",),
    ),
    _glue(
        "cola", ("matthews_correlation",), "sentence", None, Recipe(10, 32, 5e-5, 0.1, 5), "unacceptable", "acceptable"
    ),
    _glue("sst2", ("accuracy",), "sentence", None, Recipe(3, 16, 3e-5, 0.1, seeds=1), "negative", "positive"),
    _glue(
        "mrpc",
        ("accuracy", "f1"),
        "sentence1",
        "sentence2",
        Recipe(10, 32, 8e-5, 0.1, 5),
        "not_equivalent",
        "equivalent",
    ),
    _glue("stsb", ("pearson", "spearmanr"), "sentence1", "sentence2", Recipe(10, 32, 3e-5, 0.1, 5)),
    _glue(
        "qqp",
        ("accuracy", "f1"),
        "question1",
        "question2",
        Recipe(5, 16, 3e-5, 0.1, seeds=1),
        "not_duplicate",
        "duplicate",
    ),
    _glue("qnli", ("accuracy",), "question", "sentence", Recipe(10, 16, 1e-5, 0.1, 1), "entailment", "not_entailment"),
    _glue("rte", ("accuracy",), "sentence1", "sentence2", Recipe(3, 16, 1e-5, 1.0, 5), "entailment", "not_entailment"),
)


def _superglue(
    name: str, metrics: tuple[str, ...], recipe: Recipe, columns: Columns, *labels: str, rewrite: Rewrite | None = None
) -> Task:
    kind = "classification" if labels else "multiple-choice"
    return Task(name, kind, metrics, columns, recipe, labels, ("aps/super_glue", name), rewrite=rewrite)


def _copa(row: Row) -> Iterator[Row]:
    question = _COPA_QUESTIONS[row["question"]]
    choices = [row["choice1"], row["choice2"]]
    yield {"text": f"{row['premise']} {question}", "choices": choices, "label": row["label"]}


def _multirc(row: Row) -> Iterator[Row]:
    group = f"{row['idx']['paragraph']}-{row['idx']['question']}"
    text = f"{row['paragraph']} {row['question']}"
    yield {"text": text, "pair": row["answer"], "label": row["label"], "group": group}


def _record(row: Row) -> Iterator[Row]:
    passage = row["passage"].replace("\n@highlight\n", " ")
    group = f"{row['idx']['passage']}-{row['idx']['query']}"
    for entity in dict.fromkeys(row["entities"]):
        yield {
            "text": passage,
            "pair": row["query"].replace("@placeholder", entity),
            "label": int(entity in row["answers"]),
            "group": group,
            "choices": [entity],
            "answers": row["answers"],
        }


def _wic(row: Row) -> Iterator[Row]:
    yield {"text": f"{row['word']}: {row['sentence1']}", "pair": row["sentence2"], "label": row["label"]}


def _wsc(row: Row) -> Iterator[Row]:
    words = row["text"].split(" ")  # as the dataset counts the places of its spans
    place = row["span2_index"]
    words[place : place + 1] = ["*", words[place], "*"]
    yield {"text": " ".join(words), "pair": row["span1_text"], "label": row["label"]}


_SUPERGLUE = (
    _superglue("boolq", ("accuracy",), Recipe(5, 48, 5e-5, 0.1, 5), Columns("question", "passage"), *_NO_YES),
    _superglue(
        "cb",
        ("accuracy", "f1_macro"),
        Recipe(30, 16, 1e-5, 1.0, 5),
        Columns("premise", "hypothesis"),
        "entailment",
        "contradiction",
        "neutral",
    ),
    _superglue("copa", ("accuracy",), Recipe(30, 16, 1e-5, 0.5, 5), _CHOICE, rewrite=_copa),
    replace(
        _superglue("multirc", ("f1_a", "exact_match"), Recipe(6, 48, 5e-5, 0.1), _PAIR, *_NO_YES, rewrite=_multirc),
        judged="answer sets",
    ),
    replace(
        _superglue("record", ("f1", "exact_match"), Recipe(2, 32, 3e-5, 0.1, 1), _PAIR, *_NO_YES, rewrite=_record),
        judged="candidates",
    ),
    _superglue("wic", ("accuracy",), Recipe(3, 16, 3e-5, 0.1, 5), _PAIR, *_NO_YES, rewrite=_wic),
    _superglue("wsc", ("accuracy",), Recipe(30, 16, 1e-5, 0.1, 5), _PAIR, *_NO_YES, rewrite=_wsc),
)


def _others() -> Iterator[Task]:
    review = Recipe(3, 16, 3e-5, 0.1, 3)  # SST-2's, which is of the same kind
    yield Task("film-reviews", "classification", ("accuracy",), Columns(), review, ("negative", "positive"))
    for name in ("commonsense_qa", "openbookqa", "piqa", "social_i_qa"):
        yield Task(name, "multiple-choice", ("accuracy",), _CHOICE, Recipe(3, 16, 2e-5, 0.1, 3))
    answers = Columns("question", "context", "answers")
    for name in ("squad", "squad_v2"):
        recipe = Recipe(2, 32, 3e-5, 0.1, 3)
        yield Task(name, "question-answering", ("f1",), answers, recipe, hub=(f"rajpurkar/{name}", None))


NAMED_TASKS: Mapping[str, Task] = {task.name: task for task in (*_GLUE, *_SUPERGLUE, *_others())}
GROUPS: Mapping[str, tuple[str, ...]] = {
    "glue": tuple(task.name for task in _GLUE),
    "superglue": ("boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc"),
}


def named_tasks(names: str) -> list[Task] | None:
    """Return the tasks that names with commas between them stand for, each behind the one that it starts from.

    Returns None if none of the names is known: the text may be a path. Raises: ConfigError for an unknown one.
    """
    asked = [name.strip() for name in names.split(",") if name.strip()]
    if not any(name in GROUPS or name in NAMED_TASKS for name in asked):
        return None
    found: dict[str, Task] = {}
    for name in asked:
        if name not in GROUPS and name not in NAMED_TASKS:
            raise unknown(name)
        found |= {member: NAMED_TASKS[member] for member in GROUPS.get(name, (name,))}
    return sorted(found.values(), key=lambda task: task.starts_from in found)  # sorted() keeps the order of equals


def unknown(name: str) -> ConfigError:
    """Return the error for a task that is neither a known name nor a file."""
    known = [*GROUPS, *NAMED_TASKS]
    return ConfigError(
        f"--task {name} is neither a file or folder nor one of {', '.join(known)}{nearest(name, known)}."
    )
