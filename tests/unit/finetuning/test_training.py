"""Our setup of Hugging Face's Trainer against a plain loop of torch: the same weights after the same steps."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, mse_loss
from transformers import set_seed
from transformers.trainer_utils import IntervalStrategy

from raptr_ds.finetuning.encoder import Encoder, load_for
from raptr_ds.finetuning.examples import to_examples
from raptr_ds.finetuning.features import Features, encode
from raptr_ds.finetuning.task import Columns, Recipe, Task, TaskData
from raptr_ds.finetuning.training import Settings, make_trainer, training_arguments
from tests.unit.finetuning.conftest import sentences

TASK = Task("toy", "classification", ("accuracy",), Columns(), Recipe())
RECIPE = Recipe(epochs=2, batch_size=8, learning_rate=1e-3, weight_decay=0.1)
LABELS = ("no", "yes")


def split_of(task: Task, encoder: Encoder, labels: tuple[str, ...]) -> TaskData[Features]:
    rows = sentences(40)
    if task.kind == "regression":
        rows = [{**row, "label": len(row["text"]) / 10} for row in rows]
    train, validation = (to_examples(task, part, labels, "rows") for part in (rows[:32], rows[32:]))
    parts = [encode(task, examples, encoder.tokenizer, 16) for examples in (train, validation)]
    return TaskData(parts[0], parts[1], labels)


def plain_loop(
    model: torch.nn.Module, batches: list[list[dict[str, Any]]], per_step: int, loss_of: Callable[..., torch.Tensor]
) -> list[float]:
    """AdamW with decay on matrices, 6% of warm-up, linear decay to 0, gradients clipped at a norm of 1.

    Returns the norms before they are clipped: the steps alone would not show a gradient that is too large by a factor.
    """
    norms = []
    steps = len(batches) // per_step
    warmup = -(-6 * steps // 100)  # rounded up
    matrices = [one for one in model.parameters() if one.ndim > 1]
    others = [one for one in model.parameters() if one.ndim == 1]
    groups = [{"params": matrices, "weight_decay": RECIPE.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6)
    for step in range(steps):
        rate = step / warmup if step < warmup else (steps - step) / (steps - warmup)
        for group in optimizer.param_groups:
            group["lr"] = RECIPE.learning_rate * rate
        optimizer.zero_grad()
        for batch in batches[step * per_step : (step + 1) * per_step]:
            longest = max(len(row["input_ids"]) for row in batch)
            ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in batch])
            mask = torch.tensor(
                [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in batch]
            )
            logits = model(input_ids=ids, attention_mask=mask).logits
            (loss_of(logits, torch.tensor([row["label"] for row in batch])) / per_step).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
    return norms


@pytest.mark.parametrize(
    ("encoder", "kind", "micro"),
    [("bert", "classification", None), ("rotary bert", "classification", 4), ("bert", "regression", 2)],
    indirect=["encoder"],
)
def test_trainer_is_a_plain_loop(tmp_path: Path, encoder: Encoder, kind: str, micro: int | None) -> None:
    labels = LABELS if kind == "classification" else ()
    task = replace(TASK, kind=kind, metrics=("accuracy",) if labels else ("pearson",))  # type: ignore[arg-type]
    data, settings = split_of(task, encoder, labels), Settings(RECIPE, max_length=16, micro_batch_size=micro)
    arguments = training_arguments(settings, 3, tmp_path / "seed")
    arguments.eval_strategy = IntervalStrategy.NO  # so that every batch is one of training,
    arguments.logging_strategy, arguments.logging_steps = IntervalStrategy.STEPS, 1
    arguments.load_best_model_at_end = False  # and the weights are those of the last step
    set_seed(3)
    model = load_for(task, labels, encoder, None).double()
    plain = load_for(task, labels, encoder, None).double()
    plain.load_state_dict(model.state_dict())
    trainer = make_trainer(task, data, encoder, settings, model, arguments)
    seen: list[list[dict[str, Any]]] = []
    collate = trainer.data_collator

    def recorded(rows: list[dict[str, Any]]) -> dict[str, Any]:
        seen.append(rows)
        return {name: value.double() if value.is_floating_point() else value for name, value in collate(rows).items()}

    trainer.data_collator = recorded
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.train()
    per_step = 8 // (micro or 8)
    assert len(seen) == 2 * 4 * per_step
    # Every row once in each epoch.
    texts = [tuple(row["input_ids"]) for batch in seen for row in batch]
    assert sorted(texts[:32]) == sorted(texts[32:]) == sorted(tuple(row["input_ids"]) for row in data.train)

    def loss_of(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return cross_entropy(logits, wanted) if labels else mse_loss(logits[:, 0], wanted.double())

    plain.train()
    norms = plain_loop(plain, seen, per_step, loss_of)
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert logged == pytest.approx(norms, rel=1e-6)  # fp64, but logged in fp32
    moved = 0.0
    for name, value in plain.state_dict().items():
        assert torch.allclose(value, model.state_dict()[name], atol=1e-9, rtol=0), name  # fp64, other orders of sums
        moved = max(moved, (value - before[name]).abs().max().item())
    assert moved > 1e-3  # of a few steps of 1e-3 each


@pytest.mark.parametrize("encoder", ["bert"], indirect=True)
def test_a_seed_draws_the_same_head_and_order(tmp_path: Path, encoder: Encoder) -> None:
    heads = []
    for seed in (1, 1, 2):
        set_seed(seed)
        heads.append(load_for(TASK, LABELS, encoder, None).classifier.weight.detach().clone())
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
