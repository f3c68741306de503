"""Numbers that are not finite, in runs as users start them: a stop that says why, and a rollback that goes on."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import (
    ENV,
    PATIENCE,
    REPOSITORY,
    call,
    deepspeed_command,
    forked,
    lines_of,
    tiny_run,
    training_lines,
)


def test_a_run_that_diverges_stops_with_a_faults_code_and_says_why(run_file: Path, tmp_path: Path) -> None:
    """A learning rate of 1e30 makes weights whose squares fp32 cannot hold."""
    settings = ["optimizer.params.lr=1e30", "raptr_ds.train.max_non_finite_steps=4", "raptr_ds.checkpoint.interval=1"]
    done = call(deepspeed_command(run_file, *settings))
    assert done.returncode not in (0, 2, 75), done.stdout + done.stderr
    assert done.stderr.count("NonFiniteError") == 1
    assert "steps 2 to 5, 4 in a row, had a loss or a gradient that is not finite" in done.stderr
    assert "the weights are those after step 1" in done.stderr
    assert "Lower optimizer.params.lr" in done.stderr
    assert "Traceback" not in done.stderr
    save = tmp_path / "run"
    lines = training_lines(save)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 2, 3, 4]
    assert [line.get("non_finite", False) for line in lines] == [False] + [True] * 4
    assert [path.name for path in (save / "checkpoints").iterdir()] == ["step-00000001"]


@pytest.fixture(scope="module")
def odd_data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of made-up words, and one document that is one word again and again."""
    folder = tmp_path_factory.mktemp("odd-corpus")
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghiklmnorstu", k=draw.randint(2, 7))) for _ in range(300)]
    documents = [json.dumps({"text": " ".join(draw.choices(words, k=200))}) for _ in range(60)]
    documents[30] = json.dumps({"text": " ".join(words[:1] * 200)})
    (folder / "text.jsonl").write_text("\n".join(documents))
    command = [sys.executable, "tools/prepare_data.py", "--input", str(folder / "text.jsonl")]
    command += ["--output", str(folder / "tokens"), "--vocab-size", "600", "--workers", "1"]
    subprocess.run(command, cwd=REPOSITORY, env=ENV, check=True, timeout=PATIENCE, capture_output=True)
    return folder / "tokens"


def test_a_rollback_leaves_the_bad_data_out_and_finishes(odd_data_folder: Path, tmp_path: Path) -> None:
    """fp16 with a static loss scale that the odd document's gradients overflow, and no other's.

    In its batch (the fifth, with this seed) half the predicted tokens are one, whose gradient is the sum of all theirs:
    several times any gradient of the other batches. The scale lies in the middle.
    """
    save, run = tmp_path / "run", tmp_path / "run.json"
    tree = tiny_run(
        odd_data_folder,
        save,
        model={"seq_length": 128},
        train={"steps": 12, "seed": 16, "max_non_finite_steps": 1, "on_non_finite": "rollback"},
        checkpoint={"interval": 3},
        eval={"interval": 4},
    )
    tree.update(train_batch_size=2, fp16={"enabled": True, "loss_scale": 60_000})
    run.write_text(json.dumps(tree))
    done = forked(run, processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 5 had a loss or a gradient that is not finite" in done.stdout
    assert "Rolled back to" in done.stdout
    assert "4 samples are left out" in done.stdout
    lines = training_lines(save)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["skipped_steps"] for line in lines] == [0] * 3 + [1] * 9
    assert not any("non_finite" in line for line in lines)
    assert [line["tokens"] for line in lines] == [2 * 128 * step for step in range(1, 13)]
    assert [line["step"] for line in lines_of(save) if "eval_loss" in line] == [4, 8, 12]
    aside = [json.loads(line) for line in (save / "metrics.rolled_back.jsonl").read_text().splitlines()]
    assert [(line["step"], "eval_loss" in line) for line in aside] == [(4, False), (4, True), (5, False)]
    assert aside[-1]["non_finite"] is True
    manifest = json.loads((save / "checkpoints" / "step-00000012" / "manifest.json").read_text())
    assert (manifest["run_state"]["next_sample"], manifest["run_state"]["skipped_steps"]) == (2 * 14, 1)

    more = forked(run, "raptr_ds.train.steps=14", "raptr_ds.path.schedule=4", processes=2)
    assert more.returncode == 0, more.stdout + more.stderr
    assert [line["step"] for line in training_lines(save)] == list(range(1, 15))
    assert training_lines(save)[-1]["skipped_steps"] == 1
