"""Exports and scores beside the training: real processes, stopped and killed at the worst moments, lose nothing."""

import json
import os
import shutil
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from raptr_ds.checkpoint.folder import checkpoints_in
from raptr_ds.checkpoint.weights import load_trained_model
from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.model.stage import build_stage
from raptr_ds.parallel.groups import lone_process_groups
from raptr_ds.parallel.launch import Launch
from raptr_ds.runtime import side_process
from tests import export_tools
from tests.integration.conftest import PATIENCE, REPOSITORY, forked, lines_of, tiny_run, training_lines

UL2 = {"architecture": "ul2"}
TASKS = {"tasks": ["boolq"], "task_limit": 7, "task_shots": 1, "task_files": "files"}


def run_with(tmp_path: Path, data: Path, **sections: dict[str, Any]) -> Path:
    """Write a run of 12 steps that saves each third, keeps one, and exports each sixth and the last."""
    sections = {"checkpoint": {"interval": 3, "keep": 1, "export_interval": 6}, **sections}
    path = tmp_path / "run.json"
    path.write_text(json.dumps(tiny_run(data, tmp_path / "run", **sections)))
    return path


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder with stand-ins for both tools."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("export_hf", "evaluate"):
        shutil.copy(export_tools.__file__, folder / f"{name}.py")
    return folder


def use(launch: Launch, tools: Path, signals: tuple[int, ...] = (), when: str = "", save: Path | None = None) -> None:
    """In the process of a run: start the stand-ins; send it signals once a file is there and all steps are trained."""
    side_process.TOOLS = tools

    def send() -> None:
        while not (tools / when).exists() or (save is not None and len(training_lines(save)) < 12):
            time.sleep(0.05)
        for number in signals:
            os.kill(os.getpid(), number)

    if signals:
        threading.Thread(target=send, daemon=True).start()


def calls_of(tools: Path, name: str) -> list[list[str]]:
    file = tools / f"{name}.calls"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def events_of(save: Path, *names: str) -> list[tuple[str, int]]:
    events = map(json.loads, (save / "events.jsonl").read_text().splitlines())
    return [(event["event"], event["step"]) for event in events if event["event"] in names]


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name[-8:]) for path in checkpoints_in(folder))


def task_lines(save: Path) -> list[dict[str, Any]]:
    return [line for line in lines_of(save) if "tasks" in line]


def assert_gone(tools: Path, name: str) -> None:
    process = Path("/proc", (tools / f"{name}.process").read_text())
    deadline = time.monotonic() + PATIENCE
    while process.exists() and "\nState:\tZ" not in (process / "status").read_text():
        assert time.monotonic() < deadline, "the tool outlives its run"
        time.sleep(0.05)


def test_an_export_is_its_checkpoint_whatever_layout_trains(data_folder: Path, tmp_path: Path) -> None:
    # Not for the whole file: the ranks of the other tests import it too, and transformers takes a second of CPU.
    from transformers import AutoTokenizer, LlamaForCausalLM

    from raptr_ds.hf.model import hugging_face_inputs
    from tests.unit.hf.test_exported_models import batch_of, log_probabilities

    run = run_with(tmp_path, data_folder, model=UL2, path={"schedule": "2-4"}, train={"steps": 4})  # the last step's
    done = forked(run, "raptr_ds.parallel.tensor_model_parallel_size=2", processes=2)
    assert done.returncode == 0, done.stderr
    save = tmp_path / "run"
    assert events_of(save, "export") == [("export", 4)]
    assert {path.name for path in (save / "exports").iterdir()} == {"step-00000004", "export.log"}
    export = save / "exports" / "step-00000004"
    assert f"export of step 4: {export}, made in" in done.stdout
    trained = load_trained_model(save / "checkpoints" / export.name)
    with lone_process_groups() as groups:
        stage = build_stage(trained.model, groups, range(4), recompute=False, seed=1)
        stage.load_state_dict(trained.weights)
        batch = batch_of(stage)
        ours = log_probabilities(stage, batch, num_layers=4)
    model = LlamaForCausalLM.from_pretrained(export, local_files_only=True).eval()
    with torch.no_grad():
        theirs = model(batch.tokens, hugging_face_inputs(trained.model, batch)["attention_mask"]).logits.log_softmax(-1)
    assert (theirs.flatten(0, 1)[batch.positions] - ours).abs().max() < 1e-5  # fp32, another order of sums
    tokenizer, text = Tokenizer.load(data_folder / "tokenizer.model"), "a few words of a text"
    assert AutoTokenizer.from_pretrained(export).encode(text) == tokenizer.encode(text).tolist()


def test_what_cannot_be_exported_is_refused_before_training(data_folder: Path, tmp_path: Path) -> None:
    model = {"architecture": "ul2", "position_embedding": "learned"}
    done = forked(run_with(tmp_path, data_folder, model=model), processes=2)
    assert done.returncode == 2
    assert done.stderr.count("ConfigError") == 1
    assert "raptr_ds.checkpoint.export_interval=6: LlamaForCausalLM of transformers has" in done.stderr
    assert "raptr_ds.model.position_embedding=learned" in done.stderr
    assert "remove the key, to train without" in done.stderr
    assert not lines_of(tmp_path / "run")


def test_tasks_that_nobody_knows_are_refused_before_training(data_folder: Path, tmp_path: Path, tools: Path) -> None:
    (tmp_path / "files").mkdir()
    (tools / "evaluate.py").unlink()  # the real one, beside a stand-in for the export
    (tools / "evaluate.py").symlink_to(REPOSITORY / "tools" / "evaluate.py")
    evaluation = {**TASKS, "tasks": ["bolq"], "task_files": str(tmp_path / "files")}
    run = run_with(tmp_path, data_folder, model=UL2, eval=evaluation)
    done = forked(run, processes=2, spoil=partial(use, tools=tools))
    assert done.returncode == 2
    assert done.stderr.count("ConfigError") == 1
    assert "raptr_ds.eval.tasks=['bolq']: " in done.stderr
    assert "boolq" in done.stderr
    assert not lines_of(tmp_path / "run")


def test_a_killed_run_makes_its_exports_when_it_is_started_again(
    data_folder: Path, tmp_path: Path, tools: Path
) -> None:
    """kill -9 while an export is half written: training has gone on, and no checkpoint that is needed is gone."""
    run, save = run_with(tmp_path, data_folder), tmp_path / "run"
    (tools / "export_hf.slow").touch()
    spoil = partial(use, tools=tools, signals=(signal.SIGKILL,), when="export_hf.process", save=save)
    assert forked(run, spoil=spoil).returncode == -signal.SIGKILL
    assert_gone(tools, "export_hf")
    assert (save / "exports" / ".unfinished-step-00000006" / "half").exists()
    kept = steps_in(save / "checkpoints")
    # 6 is held for its export, although only the newest is kept: 9, or 12 if it was complete, before or after 9 went
    assert kept in ([6, 9], [6, 9, 12], [6, 12])
    (tools / "export_hf.slow").unlink()
    done = forked(run, spoil=partial(use, tools=tools))
    assert done.returncode == 0, done.stderr
    assert steps_in(save / "exports") == [6, 12]
    assert not list((save / "exports").glob(".*"))
    for step in (6, 12):
        export = save / "exports" / f"step-{step:08d}"
        assert (export / "whole").read_text() == str(save / "checkpoints" / export.name)
    assert [Path(words[0]).name for words in calls_of(tools, "export_hf")] == [
        *("step-00000006", "step-00000006", "step-00000012")
    ]
    assert steps_in(save / "checkpoints") == [12]


def test_the_end_of_a_run_that_exports_is_saved_and_exported(data_folder: Path, tmp_path: Path, tools: Path) -> None:
    checkpoint = {"interval": 5, "keep": 1, "export_interval": 5, "save_on_exit": False}
    run, save = run_with(tmp_path, data_folder, checkpoint=checkpoint), tmp_path / "run"
    done = forked(run, spoil=partial(use, tools=tools))
    assert done.returncode == 0, done.stderr
    assert steps_in(save / "exports") == [5, 10, 12]


def test_a_run_that_was_complete_before_it_had_exports_is_exported(
    data_folder: Path, tmp_path: Path, tools: Path
) -> None:
    run = run_with(tmp_path, data_folder, model=UL2, checkpoint={"interval": 5})
    assert forked(run).returncode == 0
    run_with(tmp_path, data_folder, model=UL2, checkpoint={"interval": 5, "export_interval": 5}, eval=TASKS)
    done = forked(run, spoil=partial(use, tools=tools))
    assert done.returncode == 0, done.stderr
    assert "this run is complete" in done.stdout
    assert steps_in(tmp_path / "run" / "exports") == [12]
    assert [line["step"] for line in task_lines(tmp_path / "run")] == [12]


def test_a_stop_leaves_exports_to_the_next_start(data_folder: Path, tmp_path: Path, tools: Path) -> None:
    run, save = run_with(tmp_path, data_folder), tmp_path / "run"
    (tools / "export_hf.slow").touch()
    spoil = partial(use, tools=tools, signals=(signal.SIGTERM,), when="export_hf.process", save=save)
    done = forked(run, spoil=spoil)
    assert done.returncode == 75, done.stderr
    assert "waiting for the export of steps 6, 12" in done.stdout
    assert_gone(tools, "export_hf")
    (tools / "export_hf.slow").unlink()
    done = forked(run, spoil=partial(use, tools=tools))
    assert done.returncode == 0, done.stderr
    assert "this run is complete" in done.stdout
    assert steps_in(save / "exports") == [6, 12]
    assert events_of(save, "export", "export_failed") == [("export", 6), ("export", 12)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_scores_are_neither_lost_nor_doubled(data_folder: Path, tmp_path: Path, tools: Path, number: int) -> None:
    run = run_with(tmp_path, data_folder, model=UL2, eval={"batches": 1, **TASKS})
    save = tmp_path / "run"
    (tools / "evaluate.slow").touch()
    spoil = partial(use, tools=tools, signals=(number,), when="evaluate.process", save=save)
    assert forked(run, spoil=spoil).returncode == (75 if number == signal.SIGTERM else -number)
    assert_gone(tools, "evaluate")
    assert not task_lines(save)
    (tools / "evaluate.slow").unlink()
    for _ in range(2):  # the second finds nothing left to do
        done = forked(run, spoil=partial(use, tools=tools))
        assert done.returncode == 0, done.stderr
    scores = [{"boolq": {"shots": 0, "acc": step / 100, "acc_stderr": None}} for step in (6, 12)]
    assert task_lines(save) == [{"step": step, "tasks": of_step} for step, of_step in zip((6, 12), scores, strict=True)]
    assert [line["step"] for line in training_lines(save)] == list(range(1, 13))
    first, *_ = calls_of(tools, "evaluate")
    export = save / "exports" / "step-00000006"
    options = ["--tasks", "boolq", "--shots", "1", "--device", "cpu", "--output", str(export / ".tasks.json")]
    assert first == [str(export), *options, "--limit", "7", "--task-files", "files"]
    assert json.loads((export / "tasks.json").read_text())["results"]["boolq"]["acc"] == 0.06


def test_a_line_that_was_lost_is_written_again(data_folder: Path, tmp_path: Path, tools: Path) -> None:
    run = run_with(tmp_path, data_folder, model=UL2, eval={"batches": 1, **TASKS, "task_interval": 12})
    assert forked(run, spoil=partial(use, tools=tools)).returncode == 0
    save = tmp_path / "run"
    (line,) = task_lines(save)
    assert line["step"] == 12
    metrics = save / "metrics.jsonl"
    metrics.write_text("".join(text for text in metrics.read_text().splitlines(keepends=True) if "tasks" not in text))
    assert forked(run, "raptr_ds.train.steps=13", spoil=partial(use, tools=tools)).returncode == 0
    assert [line["step"] for line in task_lines(save)] == [12, 13]
    assert len(calls_of(tools, "evaluate")) == 2


def test_failures_end_nothing(data_folder: Path, tmp_path: Path, tools: Path) -> None:
    run = run_with(tmp_path, data_folder, model=UL2, eval={"batches": 1, **TASKS})
    (tools / "export_hf.fails").write_text("the disk is full.")
    done = forked(run, spoil=partial(use, tools=tools))
    assert done.returncode == 0, done.stderr
    assert "export of step 6 failed: the disk is full. (all of its output" in done.stdout
    save = tmp_path / "run"
    assert events_of(save, "export_failed", "export") == [("export_failed", 6), ("export_failed", 12)]
    assert "some output" in (save / "exports" / "export.log").read_text()
    assert steps_in(save / "checkpoints") == [12]
    (tools / "export_hf.fails").unlink()
    (tools / "evaluate.fails").write_text("no such task.")
    done = forked(run, spoil=partial(use, tools=tools))
    assert done.returncode == 0, done.stderr
    assert "evaluation on tasks of step 12 failed: no such task." in done.stdout
    assert events_of(save, "export", "tasks_failed") == [("export", 12), ("tasks_failed", 12)]
    assert steps_in(save / "exports") == [12]


def test_exports_that_a_run_leaves_behind_are_set_aside(data_folder: Path, tmp_path: Path, tools: Path) -> None:
    checkpoint = {"interval": 3, "keep": 9, "export_interval": 3}
    run, save = run_with(tmp_path, data_folder, model=UL2, checkpoint=checkpoint), tmp_path / "run"
    assert forked(run, spoil=partial(use, tools=tools)).returncode == 0
    older = f"raptr_ds.checkpoint.load={save}/checkpoints/step-00000006"
    done = forked(run, older, "optimizer.params.lr=0.01", spoil=partial(use, tools=tools))
    assert done.returncode == 0, done.stderr
    assert f"exports that this run does not continue from were moved to {save}/exports/set-aside-1" in done.stdout
    assert steps_in(save / "exports" / "set-aside-1") == [9, 12]
    assert steps_in(save / "exports") == [3, 6, 9, 12]
    exported = [Path(words[0]).name[-2:] for words in calls_of(tools, "export_hf")]
    assert exported == ["03", "06", "09", "12", "09", "12"]
