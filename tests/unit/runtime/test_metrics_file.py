"""metrics.jsonl: precision, values that JSON lacks, and what a resume keeps."""

import json
import math
import os
import struct

import numpy as np
import pytest

from raptr_ds.errors import DataError
from raptr_ds.runtime.metrics_file import MetricsFile, drop_lines_after, read_metrics, to_line
from raptr_ds.user_paths import PathError


def test_floats_come_back_exactly():
    generator = np.random.default_rng(5)
    bits = generator.integers(0, 2**63 - 1, 2000)
    values = [struct.unpack("<d", struct.pack("<q", int(number)))[0] for number in bits]
    values = [value for value in values if math.isfinite(value)]
    values += [0.1 + 0.2, 1e-320, math.nextafter(1.0, 2.0), 5.0, float(np.float32(0.1))]
    line = to_line({f"v{i}": value for i, value in enumerate(values)})
    assert list(json.loads(line).values()) == values
    assert line.count("\n") == 1


def test_not_finite_is_null_with_a_mark_and_unknown_is_null_without():
    assert json.loads(to_line({"step": 1, "loss": math.nan})) == {"step": 1, "loss": None, "non_finite": True}
    assert json.loads(to_line({"step": 1, "grad_norm": math.inf, "mfu": None})) == {
        "step": 1, "grad_norm": None, "mfu": None, "non_finite": True,
    }  # fmt: skip
    assert json.loads(to_line({"step": 1, "mfu": None})) == {"step": 1, "mfu": None}


def write(path, steps, tail=""):
    path.write_text("".join(to_line({"step": step, "loss": step / 3}) for step in steps) + tail)


def steps_of(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("tail", ["", '{"step": 6, "lo', '{"step": 4, "loss": 1.5}', '{"step": 6}\n{"st'])
def test_resume_drops_later_and_torn_lines_and_appends_after_them(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 2, 3, 4, 5], tail)
    metrics = MetricsFile(path, resume_step=3)
    metrics.record({"step": 4, "loss": 0.5})
    metrics.sync()
    assert steps_of(path) == [1, 2, 2, 3, 4]
    metrics.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_torn_line_is_dropped_even_if_its_step_would_be_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2], '{"step": 3, "loss": 0.125}')  # whole but for its newline: the next line would join it
    drop_lines_after(path, 10)
    assert steps_of(path) == [1, 2]


def test_nothing_to_drop_leaves_the_file_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    drop_lines_after(path, 3)
    assert not path.exists()
    write(path, [1, 2, 3])
    before = path.stat().st_ino
    drop_lines_after(path, 3)
    assert path.stat().st_ino == before


def test_another_corpus_of_a_start_that_saved_nothing_is_forgotten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    changes = [("a", "b"), ("b", "c")]  # the checkpoint of step 2 was written again on b; c was a mistake
    records = [{"step": 2, "loss": 0.5}, *({"step": 2, "corpus": now, "corpus_before": old} for old, now in changes)]
    path.write_text("".join(map(to_line, records)))
    metrics = MetricsFile(path, 2, "b")
    metrics.rewind(2)
    metrics.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == records[:2]


def test_a_new_run_sets_old_metrics_aside(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for loss in (1.0, 2.0, 3.0):
        metrics = MetricsFile(path)
        metrics.record({"step": 1, "loss": loss})
        metrics.close()
    texts = {entry.name: json.loads(entry.read_text())["loss"] for entry in path.parent.iterdir()}
    assert texts == {"metrics.1.jsonl": 1.0, "metrics.2.jsonl": 2.0, "metrics.jsonl": 3.0}


def test_lines_reach_the_file_without_close(tmp_path):
    path = tmp_path / "metrics.jsonl"
    child = os.fork()
    if child == 0:
        metrics = MetricsFile(path)
        for step in range(1, 4):
            metrics.record({"step": step, "path": list(range(5000))})
        os._exit(0)  # as a killed process: no buffers are flushed
    os.waitpid(child, 0)
    assert steps_of(path) == [1, 2, 3]


def test_a_folder_that_cannot_be_made_is_the_users_mistake(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PathError, match=r"raptr_ds\.train\.save"):
        MetricsFile(tmp_path / "file" / "metrics.jsonl")


def test_what_is_rolled_back_is_kept_aside_in_order_and_with_every_byte(tmp_path):
    path, aside = tmp_path / "metrics.jsonl", tmp_path / "metrics.rolled_back.jsonl"
    metrics = MetricsFile(path)
    for step in (1, 2, 3):
        metrics.record({"step": step, "loss": step / 3})
    before = path.read_text().splitlines()
    metrics.rewind(1)
    assert steps_of(path) == [1]
    for step in (2, 3):
        metrics.record({"step": step, "loss": step / 7})
    metrics.rewind(2)
    metrics.record({"step": 3, "loss": 0.5})
    metrics.close()
    assert steps_of(path) == [1, 2, 3]
    assert steps_of(aside) == [2, 3, 3]
    assert aside.read_text().splitlines()[:2] == before[1:]


def test_a_new_run_sets_what_an_earlier_one_rolled_back_aside(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path)
    metrics.record({"step": 1})
    metrics.rewind(0)
    metrics.record({"step": 1})
    metrics.close()
    MetricsFile(path, resume_step=1).close()
    assert (tmp_path / "metrics.rolled_back.jsonl").exists()
    MetricsFile(path).close()
    assert sorted(found.name for found in tmp_path.iterdir()) == [
        "metrics.1.jsonl", "metrics.jsonl", "metrics.rolled_back.1.jsonl",
    ]  # fmt: skip


def test_the_last_evaluation_is_the_newest_whole_finite_one_of_the_full_model(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path).last_evaluation(4, 9) is None
    write(path, [1, 2])
    assert read_metrics(path).last_evaluation(4, 9) is None
    evaluations = [(3, 2.5, 4), (6, 2.25, 4), (6, 7.0, 2), (7, math.nan, 4), (9, 1.0, 4)]
    lines = [to_line({"step": step, "eval_loss": loss, "path_length": length}) for step, loss, length in evaluations]
    write(path, [1, 2, 3], tail="".join(lines) + lines[-1].rstrip())
    assert read_metrics(path).last_evaluation(4, 9) == (9, 1.0)
    assert read_metrics(path).last_evaluation(4, 8) == (6, 2.25)
    assert read_metrics(path).last_evaluation(2, 9) == (6, 7.0)


def test_readers_get_whole_lines_and_of_several_for_a_step_the_last(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path).training == {}
    records = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "loss": None}]
    records += [{"step": 2, "eval_loss": loss, "path_length": 4} for loss in (2.5, 2.25)]
    path.write_text("".join(map(to_line, records)) + '{"step": 3, "loss": 1.5}')
    metrics = read_metrics(path)
    assert metrics.training == {1: records[0], 2: records[2]}
    assert metrics.evaluations == {(2, 4): 2.25}


@pytest.mark.parametrize(
    "damage", ["oops", "[1]", '{"loss": 1.0}', '{"step": 2, "lo', pytest.param("[" * 100_000, id="deep")]
)
def test_a_damaged_line_before_the_last_is_an_error_with_its_number(tmp_path, damage):
    path = tmp_path / "metrics.jsonl"
    write(path, [1], tail=damage + "\n")
    assert list(read_metrics(path).training) == [1]
    write(path, [1], tail=damage + "\n" + to_line({"step": 2, "loss": 1.0}))
    with pytest.raises(DataError, match="line 2"):
        read_metrics(path)
