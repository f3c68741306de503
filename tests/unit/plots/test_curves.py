"""Curves from metrics files that runs leave behind, whole and torn."""

import json

import numpy as np
import pytest

from raptr_ds.errors import DataError
from raptr_ds.plots.curves import load_all_curves, load_curves, smooth

PATHS = [[0, 3], [0, 2, 3], [0, 3], [0, 1, 3], [0, 1, 2, 3], [0, 1, 2, 3]]


def training_line(step):
    path = PATHS[step - 1]
    phase = 0 if step < 4 else 1
    line = {"step": step, "loss": 10.0 - step, "path": path, "path_length": len(path), "phase": phase}
    return {**line, "flops": 100 * step, "tokens": 10 * step, "tokens_per_second": 5.0, "mfu": None}


@pytest.fixture
def folder(tmp_path):
    lines = [training_line(step) for step in range(1, 7)]
    lines.insert(3, {"step": 3, "eval_loss": 8.5, "path_length": 4})
    lines += [{"step": 6, "eval_loss": 5.5, "path_length": 4}, {"step": 6, "eval_loss": 7.5, "path_length": 2}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_scores_on_tasks_are_curves_by_task_and_metric(folder):
    assert load_curves(folder).tasks == ()
    scores = {4: {"boolq": {"shots": 0, "acc": 0.5, "acc_stderr": 0.1}, "copa": {"acc": None}}}
    scores[2] = {"boolq": {"shots": 0, "acc": 0.25, "acc_stderr": None}}
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.writelines(json.dumps({"step": step, "tasks": tasks}) + "\n" for step, tasks in scores.items())
    (curve,) = load_curves(folder).tasks
    assert (curve.task, curve.metric) == ("boolq", "acc")
    assert (curve.step.tolist(), curve.score.tolist()) == ([2, 4], [0.25, 0.5])
    assert np.isnan(curve.errors[0])
    assert curve.errors[1] == 0.1


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["a", "b"], ["a", "b"]),
        (["standard/seed-1", "raptr/seed-1"], ["standard", "raptr"]),
        (["x/standard/seed-1", "y/standard/seed-1"], ["x", "y"]),
        (["x/a/1", "x/b/2"], ["1", "2"]),
        (["a", "a"], ["a", "a"]),
    ],
)
def test_several_runs_are_named_by_what_differs(tmp_path, folders, names):
    for name in folders:
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(training_line(1)) + "\n")
    assert [curves.name for curves in load_all_curves([tmp_path / name for name in folders])] == names


def test_columns(folder):
    curves = load_curves(folder)
    assert curves.num_layers == 4
    assert curves.step.tolist() == [1, 2, 3, 4, 5, 6]
    assert curves.loss.tolist() == [9, 8, 7, 6, 5, 4]
    assert curves.paths == tuple((tuple(path),) for path in PATHS)
    steps, losses = curves.full_model_evaluations()
    assert (steps.tolist(), losses.tolist()) == ([3, 6], [8.5, 5.5])
    assert curves.flops_at(np.array([0, 3, 6])).tolist() == [0, 300, 600]
    assert curves.phase_starts() == [(1.0, pytest.approx(7 / 3)), (4.0, pytest.approx(11 / 3))]


def test_depth_comes_from_the_resolved_configuration_where_there_is_one(folder):
    (folder / "config.json").write_text(json.dumps({"raptr_ds": {"model": {"num_layers": 6}}}))
    curves = load_curves(folder)
    assert curves.num_layers == 6
    assert curves.activity()[0].shape == (6, 6)
    assert curves.full_model_evaluations()[0].size == 0


@pytest.mark.parametrize("tail", ['{"step": 7, "loss"', '{"step": 7, "loss": 1.0, "caf\xc3'])
def test_a_torn_last_line_is_left_out(folder, tail):
    with (folder / "metrics.jsonl").open("a", encoding="latin-1") as stream:
        stream.write(tail)
    assert load_curves(folder).step.tolist() == [1, 2, 3, 4, 5, 6]


def test_a_broken_line_in_the_middle_is_refused_with_its_number(folder):
    text = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join([*text[:2], "oops\n", *text[2:]]))
    with pytest.raises(DataError, match="line 3"):
        load_curves(folder)


def test_missing_or_empty_metrics_are_the_users_mistake(tmp_path):
    with pytest.raises(DataError, match="cannot read"):
        load_curves(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="no training line"):
        load_curves(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 4, "loss": 2.5}\n')
    with pytest.raises(DataError, match="line of step 4 has a loss and no path"):
        load_curves(tmp_path)


def test_null_is_nan_and_the_last_line_of_a_step_counts(folder):
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({**training_line(6), "loss": None, "non_finite": True}) + "\n")
    curves = load_curves(folder)
    assert curves.step.tolist() == [1, 2, 3, 4, 5, 6]
    assert np.isnan(curves.loss[-1])


def test_activity_of_several_paths_in_a_step_is_their_share(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    training[0] |= {"path": [0, 1, 2, 3], "paths": [[0, 1, 3], [0, 2, 3], [0, 3], [0, 2, 3]]}
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in training))
    assert load_curves(folder).activity()[0].T[0].tolist() == [1.0, 0.25, 0.5, 1.0]


def test_layers_in_part_count_by_the_share_that_runs(folder):
    lines = [training_line(step) | ({"width": 1} if step == 1 else {}) for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert load_curves(folder).width.tolist() == [1.0, 1.0]
    (folder / "config.json").write_text(
        json.dumps({"raptr_ds": {"model": {"num_layers": 4, "num_attention_heads": 2}}})
    )
    curves = load_curves(folder)
    assert curves.width.tolist() == [0.5, 1.0]
    active, _ = curves.activity()
    assert active[lines[0]["path"][0], 0] == 0.5
    ran = (0.5 * len(lines[0]["path"]) + len(lines[1]["path"])) / 8
    assert curves.share_run == pytest.approx(ran)
    assert curves.ran_in_words == f"{ran:.0%} of the work of all layers of all steps: layers ran in part"


def test_activity_is_exact_for_few_steps_and_a_mean_for_many(folder):
    curves = load_curves(folder)
    activity, edges = curves.activity()
    assert edges.tolist() == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5]
    assert activity.T.tolist() == [[float(layer in path) for layer in range(4)] for path in PATHS]
    activity, edges = curves.activity(max_columns=2)
    assert edges.tolist() == [0.5, 3.5, 6.5]
    np.testing.assert_allclose(activity, [[1, 1], [0, 1], [1 / 3, 2 / 3], [1, 1]])


def test_smooth_is_a_moving_mean_of_what_is_known():
    values = np.array([1.0, 3.0, np.nan, 5.0, np.nan, np.nan, np.nan])
    np.testing.assert_allclose(smooth(values, 2), [1, 2, 3, 5, 5, np.nan, np.nan])


def test_seconds_are_those_of_the_runs_own_steps(folder):
    """A step without a line counts as the next one; steps of the run whose checkpoint it began from do not count."""
    lines = [{**training_line(step), "step_seconds": seconds} for step, seconds in ((2, 0.5), (4, 1.0), (5, 2.0))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert load_curves(folder).seconds.tolist() == [1.0, 3.0, 5.0]
    starts = [{"event": "start", "step": step} for step in (1, 3)]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in starts))
    assert load_curves(folder).seconds.tolist() == [0.5, 2.5, 4.5]
