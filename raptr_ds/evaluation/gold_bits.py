"""Bits per byte of the gold answer, beside a task's own metrics.

How well a model predicts the right answer separates models that are too small for accuracies above chance. Every task
with a gold text gets one more request, for the likelihood of that text behind the prompt. For multiple choice it is
one of those that the task makes anyway, and costs nothing. A document whose gold answer is longer than the model takes
has no such bits.
"""

import math
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task

from raptr_ds.evaluation.likelihoods import moved_spaces

METRIC = "bits_per_byte"


class GoldInstance(Instance):
    """The request for the gold answer's likelihood. A model may answer None: the task can do without."""


class _GoldBits:
    """Mixed into a task's class: adds the request and the metric."""

    def construct_requests(self: Any, doc: Any, ctx: Any, **kwargs: Any) -> list[Instance]:
        """Return the task's requests, and the one for the gold answer."""
        made = super().construct_requests(doc, ctx, **kwargs)  # type: ignore[misc]
        requests = made if isinstance(made, list) else [made]
        gold = gold_answer(self, doc)
        if gold is None:
            return requests
        which, text = gold
        context = ctx if isinstance(ctx, str) else ctx[which]
        metadata, number = kwargs.get("metadata", (None, None, None)), len(requests)
        return [*requests, GoldInstance("loglikelihood", doc, (context, text), number, metadata)]

    def apply_filters(self: Any) -> None:
        """Apply the task's filters to its own requests only: they take texts. Of a likelihood they make bits."""
        every = self._instances
        golds = [instance for instance in every if isinstance(instance, GoldInstance)]
        self._instances = [instance for instance in every if not isinstance(instance, GoldInstance)]
        super().apply_filters()  # type: ignore[misc]
        for gold in golds:
            gold.filtered_resps |= dict.fromkeys(self._instances[0].filtered_resps, _bits_per_byte(gold))
        self._instances = every

    def process_results(self: Any, doc: Any, results: Any) -> dict[str, Any]:
        """Return the document's metrics."""
        if gold_answer(self, doc) is None:
            return super().process_results(doc, results)  # type: ignore[misc]
        *own, bits = results
        return super().process_results(doc, own) | ({} if bits is None else {METRIC: bits})  # type: ignore[misc]

    def aggregation(self: Any) -> dict[str, Any]:
        """The mean over documents, for which the harness has a standard error."""
        return {METRIC: mean, **super().aggregation()}  # type: ignore[misc]

    def higher_is_better(self: Any) -> dict[str, bool]:
        """Fewer bits are better."""
        return {METRIC: False, **super().higher_is_better()}  # type: ignore[misc]

    def build_qa_turn(self: Any, *, c: Any = None, a: Any = None, **kwargs: Any) -> Any:
        """Show the first of several right choices in few-shot examples, where lm-eval 0.4.13 fails (webqs)."""
        if isinstance(a, list) and a and isinstance(a[0], int) and c:
            a = a[0]
        return super().build_qa_turn(c=c, a=a, **kwargs)  # type: ignore[misc]


def with_gold_bits(kind: type[Task]) -> type[Task]:
    """Return a class of task that has the metric bits_per_byte."""
    return type(kind.__name__, (_GoldBits, kind), {})


def _bits_per_byte(gold: GoldInstance) -> float | None:
    """Return the bits of a gold answer by the bytes of what was scored; None if nothing was."""
    if gold.resps[0] is None:
        return None
    log_likelihood, _ = gold.resps[0]
    _, scored = moved_spaces(*gold.args)
    return -log_likelihood / math.log(2) / len(scored.encode())


def gold_answer(task: Any, doc: Any) -> tuple[int, str] | None:
    """Return the number of the right context (0 if there is one) and the right continuation; None if there is none.

    Of several right answers it is the first, which the harness also shows in its few-shot examples.
    """
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return None
    if task.config.task == "drop":  # whose doc_to_target joins the names of the answer's fields
        return 0, " " + ", ".join(doc["answers"][0])
    delimiter, target = task.config.target_delimiter, task.doc_to_target(doc)
    if getattr(task, "multiple_input", 0):
        return int(task.doc_to_text(doc)), f"{delimiter}{target}"
    if isinstance(target, list):
        target = target[0] if target else None
    if isinstance(target, int) and task.config.doc_to_choice is not None:
        choices = task.doc_to_choice(doc)
        target = choices[target] if 0 <= target < len(choices) else None
    if target is None or not str(target).strip():
        return None
    text = str(target)
    if task.OUTPUT_TYPE == "loglikelihood":
        return 0, text
    if task.OUTPUT_TYPE != "multiple_choice" and text[0].isspace():
        return 0, text
    return 0, f"{delimiter}{text}"
