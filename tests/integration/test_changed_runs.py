"""Runs that go on after their user has changed something around them."""

import json
from pathlib import Path

from tests.integration.conftest import forked, tiny_run, training_lines


def test_a_grown_model_does_not_shrink_when_its_run_is_made_longer(data_folder: Path, tmp_path: Path) -> None:
    run, save = tmp_path / "run.json", tmp_path / "run"
    changes = {"path": {"method": "stacking", "schedule": "2-4"}, "eval": {"batches": 0}}
    run.write_text(json.dumps(tiny_run(data_folder, save, **changes)))
    assert forked(run).returncode == 0
    longer = forked(run, "raptr_ds.train.steps=40")
    assert longer.returncode == 2, longer.stdout
    assert "has layers 0-3 after step 12, and by this run file it would have layers 0, 1" in longer.stderr
    done = forked(run, "raptr_ds.train.steps=14", "raptr_ds.path.method=full")  # what the message advises
    assert done.returncode == 0, done.stderr
    assert [line["path_length"] for line in training_lines(save)] == [2] * 6 + [4] * 8


def test_a_checkpoint_that_was_moved_and_linked_stays_the_runs_own(data_folder: Path, tmp_path: Path) -> None:
    run, checkpoints = tmp_path / "run.json", tmp_path / "run" / "checkpoints"
    changes = {"checkpoint": {"keep": 1}, "eval": {"batches": 0}}
    run.write_text(json.dumps(tiny_run(data_folder, tmp_path / "run", **changes)))
    assert forked(run).returncode == 0
    (checkpoints / "step-00000012").rename(tmp_path / "larger_disk")
    (checkpoints / "step-00000012").symlink_to(tmp_path / "larger_disk")
    again = forked(run, "raptr_ds.train.steps=13", "raptr_ds.checkpoint.save_on_exit=false")  # as if it had been killed
    assert again.returncode == 0, again.stderr
    assert "moved to" not in again.stdout
    last = forked(run, "raptr_ds.train.steps=13")
    assert "continuing after step 12" in last.stdout
    assert [line["step"] for line in training_lines(tmp_path / "run")] == list(range(1, 14))
    assert "cannot be removed" not in forked(run, "raptr_ds.train.steps=13").stdout
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000013"]
    assert (tmp_path / "larger_disk" / "manifest.json").is_file()
