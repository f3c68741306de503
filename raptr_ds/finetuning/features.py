"""Examples to what a model takes: token ids in batches, and a model's outputs back to metrics."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from transformers import EvalPrediction, PreTrainedTokenizerFast

from raptr_ds.finetuning.metrics import measure, measure_answers, with_score
from raptr_ds.finetuning.spans import Window, best_answers, positions_of, windows_of
from raptr_ds.finetuning.task import Example, Task

_CHUNK = 1000  # examples that are tokenized at a time


@dataclass(frozen=True)
class Features(Dataset):
    """A split of a task as tokens. rows: of each example, or window of one, the model's inputs and its label."""

    task: Task
    examples: Sequence[Example]
    rows: list[dict[str, Any]]
    windows: tuple[Window, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the inputs as lists of numbers, which the collators of transformers pad."""
        return {name: _listed(value) for name, value in self.rows[index].items()}

    def metrics(self, predicted: EvalPrediction) -> dict[str, float]:
        """Return the metrics of a model's outputs for this split."""
        outputs = predicted.predictions
        if self.task.kind != "question-answering":
            logits = outputs[0] if isinstance(outputs, tuple) else outputs
            return measure(self.task, logits, self.examples)
        may_be_empty = any(not example.answers for example in self.examples)
        starts, ends = outputs  # type: ignore[misc]
        texts = best_answers(self.windows, starts, ends, self.examples, may_be_empty)
        return with_score(self.task, measure_answers(texts, [example.answers for example in self.examples]))


def encode(task: Task, examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, max_length: int) -> Features:
    """Return a split's features: [CLS] text [SEP], with a pair [CLS] text [SEP] pair [SEP], cut to `max_length` tokens.

    Of a pair the longer text is cut; of a question's context no token is lost (`windows_of`).
    """
    rows: list[dict[str, Any]] = []
    windows: list[Window] = []
    for begin in range(0, len(examples), _CHUNK):
        chunk = examples[begin : begin + _CHUNK]
        if task.kind == "question-answering":
            new = windows_of(chunk, tokenizer, max_length, begin)
            windows += new
            for window in new:
                start, end = positions_of(window, examples[window.example])
                inputs = {name: np.array(ids, np.int32) for name, ids in window.inputs.items()}
                rows.append({**inputs, "start_positions": start, "end_positions": end})
        else:
            rows += (_choice_rows if task.kind == "multiple-choice" else _text_rows)(chunk, tokenizer, max_length)
    return Features(task, examples, rows, tuple(windows))


def _text_rows(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, max_length: int
) -> list[dict[str, Any]]:
    texts = [example.text for example in examples]
    pairs = None if examples[0].pair is None else [example.pair or "" for example in examples]
    encoded = tokenizer(texts, pairs, truncation=True, max_length=max_length)
    return [
        {**{name: np.array(encoded[name][i], np.int32) for name in encoded}, "label": example.label}
        for i, example in enumerate(examples)
    ]


def _choice_rows(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, max_length: int
) -> list[dict[str, Any]]:
    texts = [example.text for example in examples for _ in example.choices]
    choices = [choice for example in examples for choice in example.choices]
    encoded = tokenizer(texts, choices, truncation=True, max_length=max_length)
    number = len(examples[0].choices)
    rows = []
    for i, example in enumerate(examples):
        part = slice(i * number, (i + 1) * number)
        inputs = {name: [np.array(ids, np.int32) for ids in encoded[name][part]] for name in encoded}
        rows.append({**inputs, "label": example.label})
    return rows


def _listed(value: Any) -> Any:
    if isinstance(value, list):
        return [part.tolist() for part in value]
    return value.tolist() if isinstance(value, np.ndarray) else value
