"""A comparison through the command line: real tiny runs, the report, and nothing run twice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import ENV, PATIENCE, REPOSITORY, call, lines_of, tiny_run


def experiment(file: Path, *words: str) -> list[str]:
    """Return the command of a comparison."""
    return [sys.executable, "tools/experiment.py", str(file), *words]


@pytest.mark.slow
@pytest.mark.timeout(5 * PATIENCE)
def test_two_contestants_on_two_seeds_and_again(data_folder: Path, tmp_path: Path) -> None:
    run = tiny_run(data_folder, tmp_path, train={"steps": 6}, eval={"interval": 3}, log={"tensorboard": False})
    del run["raptr_ds"]["train"]["save"]
    (tmp_path / "run.json").write_text(json.dumps(run))
    comparison = {
        "base": "run.json",
        "set": {"raptr_ds": {"checkpoint": {"save_on_exit": False}}},
        "contestants": [{"name": "standard", "method": "standard"}, {"name": "raptr", "method": "raptr"}],
        "seeds": [1, 2],
        "budget": {"equal": "flops", "steps": 6},
        "output": str(tmp_path / "out"),
    }
    file = tmp_path / "mine.json"
    file.write_text("# two against each other\n" + json.dumps(comparison))

    listed = call(experiment(file, "--dry-run"))
    assert listed.returncode == 0, listed.stderr
    assert not (tmp_path / "out").exists()

    command = experiment(file)  # four starts in a row: four times the patience
    done = subprocess.run(
        command, cwd=REPOSITORY, env=ENV, timeout=4 * PATIENCE, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    planned = json.loads((tmp_path / "out" / "experiment.json").read_text())["contestants"]
    assert planned[0]["steps"] == 6
    assert planned[1]["steps"] > 6
    for contestant in planned:
        for seed in (1, 2):
            lines = lines_of(tmp_path / "out" / "runs" / contestant["name"] / f"seed-{seed}")
            assert lines[-1]["step"] == contestant["steps"]
            assert "eval_loss" in lines[-1]
            flops = max(line.get("flops", 0) for line in lines)
            # Predicted positions vary from batch to batch, and a step is a sixth of all.
            assert abs(flops / planned[0]["flops"] - 1) < 0.12
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "4 of 4 runs are finished" in page

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").rglob("*")}
    again = call(experiment(file))
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("finished before") == 4
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").rglob("*")} == before


def test_a_mistake_in_the_file_ends_with_2_and_starts_nothing(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"base": "nowhere.json", "contestants": [{"name": "a"}], "seeds": [1], "seed": 2}))
    refused = call(experiment(file, "--set", f"output={tmp_path}/out"))
    assert refused.returncode == 2
    assert "seed (line 1) is an unknown key; did you mean 'seeds'?" in refused.stderr
    assert not (tmp_path / "out").exists()
