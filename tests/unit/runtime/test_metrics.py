"""Metrics: the contract's keys, sinks, ranks and resume."""

import io
import json
import math
from contextlib import closing

import numpy as np
import pytest
import torch

from raptr_ds.engine.protocol import StepResult
from raptr_ds.parallel.topology import Topology
from raptr_ds.paths import LayerPath
from raptr_ds.paths.path import Parts
from raptr_ds.runtime.metrics import Metrics, TrainingStep
from raptr_ds.runtime.metrics_file import read_metrics
from raptr_ds.runtime.progress import PlainProgress
from raptr_ds.runtime.ranks import Ranks
from raptr_ds.runtime.state import RunState
from raptr_ds.runtime.tensorboard_sink import TensorBoardSink

TRAINING_KEYS = [
    "step", "loss", "lr", "grad_norm", "path", "path_length", "phase", "tokens", "flops",
    "skipped_steps", "step_seconds", "tokens_per_second", "mfu",
]  # fmt: skip


def training_step(
    step, loss=1 / 3, grad_norm=0.7, skipped=False, skipped_steps=0, path=None, seconds=0.5, flops=3000, **values
):
    state = RunState(step, 100 * step, 3000 * step, 4000 * step, skipped_steps)
    result = StepResult(loss, grad_norm, 9, skipped)
    path = path or LayerPath((0, 2, 5), 6, phase=1)
    return TrainingStep(state, result, path, lr=1e-3, seconds=seconds, tokens=100, flops=flops, **values)


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_lines_have_exactly_the_contracts_keys(tmp_path):
    with closing(Metrics(tmp_path, num_steps=2, num_devices=2, peak=12e3)) as metrics:
        metrics.record_step(training_step(1))
        metrics.record_evaluation(1, 0.25, 6)
    training, evaluation = lines_of(tmp_path)
    assert list(training) == TRAINING_KEYS
    assert training == {
        "step": 1, "loss": 1 / 3, "lr": 1e-3, "grad_norm": 0.7, "path": [0, 2, 5], "path_length": 3, "phase": 1,
        "tokens": 100, "flops": 3000, "skipped_steps": 0, "step_seconds": 0.5, "tokens_per_second": 200.0,
        "mfu": 0.25,
    }  # fmt: skip
    assert evaluation == {"step": 1, "eval_loss": 0.25, "path_length": 6}


def test_not_finite_and_missing_values(tmp_path):
    with closing(Metrics(tmp_path, num_steps=2, progress=PlainProgress(io.StringIO()))) as metrics:
        metrics.record_step(training_step(1, loss=math.nan, grad_norm=math.inf))
        metrics.record_step(training_step(2))
    first, second = lines_of(tmp_path)
    assert (first["loss"], first["grad_norm"], first["non_finite"]) == (None, None, True)
    assert second["mfu"] is None
    assert "non_finite" not in second


def test_a_skipped_step_is_marked_whatever_its_numbers_are(tmp_path):
    with closing(Metrics(tmp_path, num_steps=3)) as metrics:
        metrics.record_step(training_step(1))
        metrics.record_step(training_step(2, skipped=True, skipped_steps=1))
        metrics.record_step(training_step(3, skipped_steps=1))
    lines = lines_of(tmp_path)
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1]
    assert [line.get("non_finite") for line in lines] == [None, True, None]


def test_the_width_of_layers_that_run_in_parts_is_told(tmp_path):
    parts = Parts(4, ((0, 2, 3),) * 2, ((0, 1, 2),) * 2)
    with closing(Metrics(tmp_path, num_steps=2)) as metrics:
        metrics.record_step(training_step(1, path=LayerPath((0, 1), 2, parts=parts)))
        metrics.record_step(training_step(2))
    assert [(line["path"], line.get("width")) for line in lines_of(tmp_path)] == [([0, 1], 3), ([0, 2, 5], None)]


def test_the_paths_of_a_step_that_takes_several_are_told(tmp_path):
    shares = LayerPath((0, 1, 5), 6), LayerPath((0, 3), 6)
    with closing(Metrics(tmp_path, num_steps=1)) as metrics:
        metrics.record_step(training_step(1, path=LayerPath.of_shares(shares)))
    (line,) = lines_of(tmp_path)
    assert (line["path"], line["path_length"], line["paths"]) == ([0, 1, 3, 5], 2.5, [[0, 1, 5], [0, 3]])


def test_interval_thins_training_lines_but_for_the_last_and_no_evaluation(tmp_path):
    with closing(Metrics(tmp_path, num_steps=8, interval=3)) as metrics:
        for step in range(1, 9):
            metrics.record_step(training_step(step))
            if step == 4:
                metrics.record_evaluation(step, 1.0, 6)
    assert [line["step"] for line in lines_of(tmp_path)] == [3, 4, 6, 8]


def test_scores_on_tasks(tmp_path, events):
    output, sink = io.StringIO(), TensorBoardSink(tmp_path, 0)
    scores = {"boolq": {"shots": 5, "acc": 0.625, "acc_stderr": 0.0123, "f1": None}, "copa": {"bits": 2.0}}
    with closing(Metrics(tmp_path, num_steps=9, sinks=[sink], progress=PlainProgress(output))) as metrics:
        metrics.record_step(training_step(8))
        metrics.record_tasks(4, scores)
    assert lines_of(tmp_path)[1] == {"step": 4, "tasks": scores}
    assert read_metrics(tmp_path / "metrics.jsonl").tasks == {4: scores}
    assert "tasks after step 4: boolq acc 0.625 \u00b1 0.012; copa bits 2\n" in output.getvalue()
    assert events(tmp_path)["tasks/boolq/acc"] == [(4, 0.625)]
    assert "tasks/boolq/shots" not in events(tmp_path)


def test_other_ranks_write_and_say_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = io.StringIO()
    with closing(Metrics(None, num_steps=2, progress=PlainProgress(output))) as metrics:
        metrics.record_step(training_step(1))
        metrics.record_evaluation(1, 1.0, 6)
        metrics.say("hello")
        metrics.sync()
    assert output.getvalue() == ""
    assert list(tmp_path.iterdir()) == []


def test_progress_shows_savings_and_the_time_that_longer_paths_will_take(tmp_path):
    output = io.StringIO()
    progress = PlainProgress(output)
    flops_left = {1: 60000.0}.__getitem__
    with closing(Metrics(tmp_path, num_steps=5, progress=progress, flops_left=flops_left)) as metrics:
        metrics.record_step(training_step(1))
        metrics.record_evaluation(1, 1.5, 6)
    assert output.getvalue() == (
        "step 1/5  loss 0.3333  phase 1  path 3/6  200 tok/s  saved 25.0%  left 0:10\n"
        "step 1/5  eval loss 1.5000  path 6\n"
    )


def test_the_speed_is_that_of_the_last_steps(tmp_path):
    output = io.StringIO()
    metrics = Metrics(tmp_path, num_steps=51, progress=PlainProgress(output), flops_left=lambda step: 60000.0)
    metrics.record_step(training_step(1, seconds=50.0, flops=10**6))
    for step in range(2, 52, 2):
        metrics.record_step(training_step(step, seconds=1.0, flops=1000))
        metrics.record_step(training_step(step + 1, seconds=3.0, flops=3000))
    metrics.close()
    assert output.getvalue().endswith("50 tok/s  saved 25.0%  left 1:00\n")


def test_progress_names_a_slow_rank_and_lost_checkpoints(tmp_path):
    output, ranks = io.StringIO(), Ranks(Topology(1, 1, 2), ["a", "b"], torch.device("cpu"), 1)
    for _ in range(20):
        ranks.receive(np.array([[1.0, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0]]))
    with closing(Metrics(tmp_path, num_steps=1, progress=PlainProgress(output))) as metrics:
        metrics.record_step(training_step(1, failed_saves=3, ranks=ranks))
    assert output.getvalue().endswith("saved 25.0%  rank 1 slow (2.0 x)  3 checkpoints NOT written\n")
    assert lines_of(tmp_path)[0]["failed_saves"] == 3


def test_rewinding_moves_lines_and_purges_events(tmp_path, events):
    with closing(Metrics(tmp_path, num_steps=6, sinks=[TensorBoardSink(tmp_path, 0)])) as metrics:
        for step in range(1, 6):
            metrics.record_step(training_step(step, loss=float(step), skipped_steps=step))
        metrics.record_evaluation(3, 8.0, 6)
        metrics.record_evaluation(5, 9.0, 6)
        metrics.rewind(3)
        for step in range(4, 7):
            metrics.record_step(training_step(step, loss=float(10 * step), skipped_steps=5))
    found = [(line["step"], line.get("loss", line.get("eval_loss"))) for line in lines_of(tmp_path)]
    assert found == [(1, 1.0), (2, 2.0), (3, 3.0), (3, 8.0), (4, 40.0), (5, 50.0), (6, 60.0)]
    aside = [json.loads(line) for line in (tmp_path / "metrics.rolled_back.jsonl").read_text().splitlines()]
    assert [(line["step"], line.get("loss", line.get("eval_loss"))) for line in aside] == [(4, 4.0), (5, 5.0), (5, 9.0)]
    scalars = events(tmp_path)
    assert scalars["train/loss"] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0), (6, 60.0)]
    assert [value for _, value in scalars["progress/skipped_steps"]] == [1, 2, 3, 5, 5, 5]
    assert scalars["eval/loss_of_6_layers"] == [(3, 8.0)]


def test_other_ranks_rewind_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with closing(Metrics(None, num_steps=2)) as metrics:
        metrics.rewind(1)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def events():
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def read(folder):
        found = accumulator.EventAccumulator(str(folder / "tensorboard"))
        found.Reload()
        return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}

    return read


def test_resume_continues_file_and_events_as_if_the_lost_steps_had_not_been(tmp_path, events):
    with closing(Metrics(tmp_path, num_steps=6, sinks=[TensorBoardSink(tmp_path, 0)])) as metrics:
        for step in range(1, 6):
            metrics.record_step(training_step(step, loss=float(step)))
        metrics.record_evaluation(5, 9.0, 6)
        metrics.sync()
    with closing(Metrics(tmp_path, num_steps=6, resume_step=3, sinks=[TensorBoardSink(tmp_path, 3)])) as metrics:
        for step in range(4, 7):
            metrics.record_step(training_step(step, loss=float(10 * step)))
    assert [(line["step"], line["loss"]) for line in lines_of(tmp_path)] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0), (6, 60.0),
    ]  # fmt: skip
    scalars = events(tmp_path)
    assert scalars["train/loss"] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0), (6, 60.0)]
    assert scalars["path/length"] == [(step, 3.0) for step in range(1, 7)]
    assert "speed/mfu" not in scalars
    assert scalars.get("eval/loss_of_6_layers", []) == []
