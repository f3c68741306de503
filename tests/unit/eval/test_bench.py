"""tools/bench.py on a tiny model: it runs, compares like with like, and says what it cannot compare."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TINY = ["train_batch_size=4", "train_micro_batch_size_per_gpu=2", "raptr_ds.model.num_layers=4"]
SMALL = ["raptr_ds.model.hidden_size=32", "raptr_ds.model.seq_length=16"]


def bench(architecture: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    tool, config = ROOT / "tools" / "bench.py", ROOT / "deepspeed_configs" / f"{architecture}_quickstart.json"
    command = [sys.executable, str(tool), "--config", str(config), "--random-tokens", "90", "--repetitions", "1"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.parametrize(("architecture", "precision"), [("bert", "fp32"), ("ul2", "bf16")])
def test_a_table_with_our_paths_and_the_twin(tmp_path: Path, architecture: str, precision: str) -> None:
    report = tmp_path / "report.md"
    done = bench(architecture, "--precision", precision, "--output", str(report), "--set", *TINY, *SMALL)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.read_text().splitlines() if "|" in line]
    assert [row[:2] for row in rows[2:]] == [
        ["raptr_ds", "4"],
        ["raptr_ds", "3"],
        ["raptr_ds", "2"],
        ["Hugging Face", "4"],
    ]
    assert all(float(row[2]) > 0 for row in rows[2:])
    losses = re.search(r"raptr_ds ([\d.]+), Hugging Face ([\d.]+)", report.read_text())
    assert losses is not None
    ours, theirs = map(float, losses.groups())
    # The same weights and batch; bf16 weights here, autocast there.
    assert abs(ours - theirs) < (2e-5 if precision == "fp32" else 2e-2)
    assert f"precision {precision}" in report.read_text()


def test_a_model_without_a_twin_is_measured_alone() -> None:
    done = bench("ul2", "--set", *TINY, *SMALL, "raptr_ds.model.normalization=layernorm")
    assert done.returncode == 0, done.stderr
    assert "no Hugging Face row" in done.stdout
    assert "| Hugging Face |" not in done.stdout


def test_nothing_to_measure_is_a_mistake() -> None:
    done = bench("bert", "--repetitions", "0")
    assert done.returncode == 2
    assert "at least one round" in done.stderr
