"""Bits per byte of the gold answer, from likelihoods that are known."""

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from raptr_ds.evaluation.catalogue import Catalogue
from raptr_ds.evaluation.gold_bits import GoldInstance, gold_answer
from raptr_ds.evaluation.likelihoods import moved_spaces
from raptr_ds.evaluation.run import Outcome, run_tasks
from raptr_ds.evaluation.tasks import load_tasks


class Known(LM):
    """Gives a continuation as many nats as it has letters, plus one for each 'e' in it, and says 'nothing'."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Instance] = []

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        self.asked += requests
        return [(self.log(*request.args), False) for request in requests]

    def log(self, context: str, continuation: str) -> float:
        return -float(len(continuation) + continuation.count("e")) - 0.001 * len(context)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise AssertionError("no task here scores whole texts")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return [" nothing " for _ in requests]


def outcome_of(task_files: Path, name: str, shots: int = 0) -> tuple[Outcome, Known, Any]:
    (task,) = load_tasks(Catalogue(), [name], task_files)
    model = Known()
    (outcome,) = run_tasks([task], {"prefix": model}, (shots,))
    return outcome, model, task


def bits(model: Known, context: str, continuation: str) -> float:
    return -model.log(context, continuation) / math.log(2) / len(continuation.encode())


def mean_and_error(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


@pytest.mark.parametrize(
    ("name", "prompt", "right"),
    [
        ("boolq", "{passage}\nQuestion: {question}?\nAnswer:", lambda doc: " yes" if doc["label"] else " no"),
        (
            "cb",
            "{premise}\nQuestion: {hypothesis}. True, False, or Neither?\nAnswer:",
            lambda doc: (" True", " False", " Neither")[doc["label"]],
        ),
        ("nq_open", "Answer these questions:\n\nQ: {question}?\nA:", lambda doc: " " + doc["answer"][0]),
    ],
)
def test_it_is_the_gold_answers_bits_by_its_bytes(task_files: Path, name: str, prompt: str, right: Any) -> None:
    outcome, model, task = outcome_of(task_files, name)
    values = [bits(model, prompt.format(**doc), right(doc)) for doc in task.eval_docs]
    score = outcome.scores["bits_per_byte"]["prefix"]
    assert (score.value, score.stderr) == pytest.approx(mean_and_error(values))
    assert outcome.documents == len(values)


def test_the_tasks_own_metrics_stay(task_files: Path) -> None:
    """' no' has fewer letters than ' yes', which is then never chosen; of CB's choices it is ' True'."""
    boolq, _, task = outcome_of(task_files, "boolq")
    no = sum(doc["label"] == 0 for doc in task.eval_docs) / len(task.eval_docs)
    assert boolq.scores["acc"]["prefix"].value == pytest.approx(no)
    nq_open, _, task = outcome_of(task_files, "nq_open")
    assert nq_open.scores["exact_match"]["prefix"].value == 0.0
    assert nq_open.higher_is_better == {"exact_match": True, "bits_per_byte": False}


def test_where_the_choice_is_in_the_context_it_is_the_right_context(task_files: Path) -> None:
    outcome, model, task = outcome_of(task_files, "winogrande")
    values = []
    for doc in task.eval_docs:
        before, after = doc["sentence"].split("_")
        right = doc["option1"] if doc["answer"] == "1" else doc["option2"]
        values.append(bits(model, before + right, " " + after.strip()))
    assert outcome.scores["bits_per_byte"]["prefix"].value == pytest.approx(mean_and_error(values)[0])


def test_of_several_right_answers_it_is_the_first_which_examples_show_too(task_files: Path) -> None:
    outcome, model, task = outcome_of(task_files, "webqs", shots=2)
    assert set(outcome.scores) == {"exact_match", "bits_per_byte"}
    golds = [gold_answer(task, doc) for doc in task.eval_docs]
    assert golds == [(0, " " + sorted(doc["answers"])[0]) for doc in task.eval_docs]
    context = model.asked[0].args[0]
    shown = [f"Question: {doc['question']}\nAnswer: {sorted(doc['answers'])[0]}" for doc in task.dataset["train"]]
    assert sum(example in context for example in shown) == 2


def test_spaces_at_the_contexts_end_are_bytes_of_the_answer(
    tmp_path: Path,
) -> None:
    """ReCoRD's context ends in "- " or a newline, which are scored with the answer."""
    query = {
        "passage": "Bob ran.\n@highlight\nBob is fast",
        "query": "@placeholder ran",
        "idx": {"passage": 0, "query": 0},
    }
    rows = [{**query, "entities": ["Bob", "Tim"], "answers": [answer]} for answer in ("Bob", "Tim")]
    (tmp_path / "record").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "record" / "validation.parquet")
    outcome, model, _ = outcome_of(tmp_path, "record")
    golds = [request for request in model.asked if isinstance(request, GoldInstance)]
    moved = [moved_spaces(*gold.args) for gold in golds]
    assert all(len(scored) > len(gold.args[1]) for gold, (_, scored) in zip(golds, moved, strict=True))
    values = [
        -model.log(*gold.args) / math.log(2) / len(scored) for gold, (_, scored) in zip(golds, moved, strict=True)
    ]
    assert outcome.scores["bits_per_byte"]["prefix"].value == pytest.approx(mean_and_error(values)[0])


def test_a_gold_answer_that_the_model_cannot_take_is_left_out(task_files: Path) -> None:
    class Short(Known):
        def loglikelihood(self, requests: list[Instance]) -> list[Any]:
            return [
                None if len(request.args[1]) > 12 else found
                for request, found in zip(requests, super().loglikelihood(requests), strict=True)
            ]

    (task,) = load_tasks(Catalogue(), ["nq_open"], task_files)
    model: Any = Short()
    (outcome,) = run_tasks([task], {"prefix": model})
    golds = [request.args for request in model.asked]
    values = [bits(model, *gold) for gold in golds if len(gold[1]) <= 12]
    assert 1 < len(values) < len(golds)
    score = outcome.scores["bits_per_byte"]["prefix"]
    assert (score.value, score.stderr) == pytest.approx(mean_and_error(values))
    assert "exact_match" in outcome.scores


def test_a_task_without_a_gold_text_has_none(task_files: Path) -> None:
    (task,) = load_tasks(Catalogue(), ["nq_open"], task_files)
    assert gold_answer(task, {"question": "a", "answer": [""]}) is None
    assert gold_answer(task, {"question": "a", "answer": []}) is None
