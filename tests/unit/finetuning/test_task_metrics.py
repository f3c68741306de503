"""Metrics against counts by hand, and against scikit-learn and numpy."""

import math

import numpy as np
import pytest
from sklearn.metrics import f1_score

from raptr_ds.finetuning.metrics import SCORE, measure, measure_answers
from raptr_ds.finetuning.named_tasks import NAMED_TASKS
from raptr_ds.finetuning.task import Example


def of_labels(labels: list[int]) -> list[Example]:
    return [Example("text", label=label) for label in labels]


def one_hot(predicted: list[int], classes: int = 2) -> np.ndarray:
    return np.eye(classes)[predicted]


def test_two_classes_by_hand() -> None:
    """3 right positives, 1 wrong positive, 2 missed ones, 4 right negatives."""
    labels, predicted = [1, 1, 1, 0, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    found = measure(NAMED_TASKS["mrpc"], one_hot(predicted), of_labels(labels))
    assert found["accuracy"] == pytest.approx(7 / 10)
    assert found["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    assert found["matthews_correlation"] == pytest.approx((3 * 4 - 1 * 2) / math.sqrt(4 * 5 * 5 * 6))
    assert found[SCORE] == pytest.approx((found["accuracy"] + found["f1"]) / 2)
    cola = measure(NAMED_TASKS["cola"], one_hot(predicted), of_labels(labels))
    assert cola[SCORE] == found["matthews_correlation"]


def test_three_classes_against_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    labels, logits = rng.integers(0, 3, 50), rng.normal(size=(50, 3))
    found = measure(NAMED_TASKS["cb"], logits, of_labels(labels.tolist()))
    per_class = f1_score(labels, logits.argmax(1), average=None)
    assert found["f1_macro"] == pytest.approx(np.mean(per_class))
    assert found[SCORE] == pytest.approx((found["accuracy"] + found["f1_macro"]) / 2)
    assert "f1" not in found


def test_scores_against_numpy() -> None:
    rng = np.random.default_rng(1)
    labels, predicted = rng.normal(size=30), rng.normal(size=(30, 1))
    examples = [Example("text", label=float(label)) for label in labels]
    found = measure(NAMED_TASKS["stsb"], predicted, examples)
    ranks = [np.argsort(np.argsort(values)) for values in (labels, predicted[:, 0])]
    assert found["pearson"] == pytest.approx(np.corrcoef(labels, predicted[:, 0])[0, 1])
    assert found["spearmanr"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    constant = measure(NAMED_TASKS["stsb"], np.ones((30, 1)), examples)
    assert constant == {SCORE: 0.0, "pearson": 0.0, "spearmanr": 0.0}


def test_answers_to_a_question_are_right_together() -> None:
    """Question a: both answers judged right; b: one of two. Over all: 1 right positive, 1 wrong one, 0 missed."""
    rows = [("a", 1, 1), ("a", 0, 0), ("b", 0, 1), ("b", 0, 0)]
    examples = [Example("text", "answer", label, group=group) for group, label, _ in rows]
    found = measure(NAMED_TASKS["multirc"], one_hot([predicted for *_, predicted in rows]), examples)
    assert found["exact_match"] == 1 / 2
    assert found["f1_a"] == pytest.approx(2 / 3)
    assert found[SCORE] == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_the_likeliest_entity_is_the_answer() -> None:
    """Query 1: "New York" is chosen of "New York City"; query 2: the right one, though no score is above 0."""
    rows = [("1", "Paris", 0.1), ("1", "New York", 0.3), ("2", "Anna", -0.5), ("2", "Bob", -0.7)]
    answers = {"1": ("New York City",), "2": ("Anna", "Anna K.")}
    examples = [Example("p", "q", 0, (entity,), group, answers=answers[group]) for group, entity, _ in rows]
    logits = np.array([[0.0, score] for *_, score in rows])
    found = measure(NAMED_TASKS["record"], logits, examples)
    assert found["exact_match"] == 1 / 2
    assert found["f1"] == pytest.approx((2 * 2 / (2 + 3) + 1) / 2)


def test_texts_of_answers() -> None:
    assert measure_answers(["The Cat!"], [["a cat"]]) == {"exact_match": 1.0, "f1": 1.0}
    assert measure_answers(["big cat"], [["dog", "cat"]]) == {"exact_match": 0.0, "f1": pytest.approx(2 / 3)}
    assert measure_answers(["", "x"], [[], []]) == {"exact_match": 0.5, "f1": 0.5}
    assert measure_answers(["cat cat"], [["cat"]])["f1"] == pytest.approx(2 * 1 / (2 + 1))  # a word counts once
