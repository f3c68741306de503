"""What predictions are worth: the metrics of GLUE, SuperGLUE and SQuAD."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal
from warnings import catch_warnings, simplefilter

import numpy as np
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from raptr_ds.finetuning.task import Example, Task
from raptr_ds.hf.squad_metrics import compute_exact, compute_f1

SCORE = "score"


def measure(task: Task, logits: np.ndarray, examples: Sequence[Example]) -> dict[str, float]:
    """Return the metrics of a model's outputs, as fractions; `score` is the mean of those that the task names.

    Shapes: logits (examples, classes or choices), (examples, 1) for a regression. Question answering has texts
    instead: `measure_answers`.
    """
    labels = np.array([example.label for example in examples])
    if task.kind == "regression":
        found = _of_scores(logits.reshape(-1), labels)
    elif task.judged == "answer sets":
        found = _of_answer_sets(logits.argmax(-1), examples)
    elif task.judged == "candidates":
        found = _of_candidates(logits[:, 1] - logits[:, 0], examples)
    else:
        found = _of_classes(logits.argmax(-1), labels, binary=task.kind == "classification" and logits.shape[-1] == 2)
    return with_score(task, found)


def with_score(task: Task, found: dict[str, float]) -> dict[str, float]:
    """Return the metrics with the task's score in front."""
    return {SCORE: float(np.mean([found[name] for name in task.metrics])), **found}


def _of_classes(predicted: np.ndarray, labels: np.ndarray, binary: bool) -> dict[str, float]:
    found = {"accuracy": accuracy_score(labels, predicted), "f1_macro": _f1(predicted, labels, "macro")}
    if binary:
        with catch_warnings():
            simplefilter("ignore", UserWarning)  # of one class alone, whose correlation is none: 0
            correlation = matthews_corrcoef(labels, predicted)
        found |= {"f1": _f1(predicted, labels), "matthews_correlation": correlation}
    return {name: float(value) for name, value in found.items()}


def _f1(predicted: np.ndarray, labels: np.ndarray, average: Literal["binary", "macro"] = "binary") -> float:
    return float(f1_score(labels, predicted, average=average, zero_division=0))  # type: ignore[arg-type]


def _of_scores(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """A prediction that is the same everywhere has no correlation: it counts as none, 0."""
    with catch_warnings():
        simplefilter("ignore", stats.ConstantInputWarning)
        simplefilter("ignore", stats.NearConstantInputWarning)
        found = {"pearson": stats.pearsonr(predicted, labels), "spearmanr": stats.spearmanr(predicted, labels)}
    values = {name: float(result.statistic) for name, result in found.items()}  # type: ignore[attr-defined]
    return {name: 0.0 if math.isnan(value) else value for name, value in values.items()}


def _of_answer_sets(predicted: np.ndarray, examples: Sequence[Example]) -> dict[str, float]:
    """MultiRC: F1 over all answers, and the share of questions of which every answer is judged right."""
    labels = np.array([example.label for example in examples])
    is_right: dict[str, bool] = defaultdict(lambda: True)
    for example, value in zip(examples, predicted, strict=True):
        is_right[example.group] &= bool(value == example.label)
    return {"f1_a": _f1(predicted, labels), "exact_match": float(np.mean(list(is_right.values())))}


def _of_candidates(scores: np.ndarray, examples: Sequence[Example]) -> dict[str, float]:
    """ReCoRD: the likeliest entity of each query, against the nearest of its answers."""
    best: dict[str, int] = {}
    for index, example in enumerate(examples):
        if example.group not in best or scores[index] > scores[best[example.group]]:
            best[example.group] = index
    chosen = [examples[index] for index in best.values()]
    return measure_answers([example.choices[0] for example in chosen], [example.answers for example in chosen])


def measure_answers(predicted: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return exact match and F1 of texts, each against the nearest of its right answers.

    Without right answers no answer is right: an empty text. Source: Rajpurkar et al. 2018.
    """
    pairs = [(text, right or ("",)) for text, right in zip(predicted, answers, strict=True)]
    found = {}
    for name, compute in (("exact_match", compute_exact), ("f1", compute_f1)):
        found[name] = float(np.mean([max(compute(one, text) for one in right) for text, right in pairs]))
    return found
