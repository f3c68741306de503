"""The measuring kit's script as a GPU machine runs it, in a dry run on this CPU: every kind of step, tiny, is good."""

import bz2
import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.integration.conftest import ENV, REPOSITORY

STEPS = ("environment", "ceilings", "runs", "ul2_1b", "attention", "compare", "ul2_125m")


def packed(data: Path, folder: Path) -> Path:
    """Copy prepared tokens as prepare.sh packs them."""
    shutil.copytree(data, folder)
    (folder / "train.bin.bz2").write_bytes(bz2.compress((folder / "train.bin").read_bytes()))
    (folder / "train.bin").unlink()
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_dry_run_is_good(data_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = {"KIT_DEVICE": "cpu", "KIT_PYTHON": sys.executable, "KIT_DATA": str(data_folder), "OUT": str(out)}
    settings["KIT_TOKENS"] = str(packed(data_folder, tmp_path / "small"))
    settings |= {"KIT_SECONDS": "500", "KIT_PATIENCE": "4"}
    done = subprocess.run(
        ["bash", "tests/gpu/kit/on_device.sh", *STEPS],
        cwd=REPOSITORY,
        env={**ENV, **settings},
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )
    summary = (out / "summary.txt").read_text()
    assert done.returncode == 0, summary + done.stderr
    assert "BAD" not in summary
    lines = summary.splitlines()
    ended = [match.groups() for line in lines if (match := re.match(r"== (\w+): exit code (\d+)", line))]
    assert ended == [(step, "0") for step in STEPS]
    good = [line.split(":")[0] for line in lines if line.startswith("OK ")]
    assert "OK test_training_runs.py" in good
    assert sum(line.startswith("OK ul2_1b as shipped, path ") for line in lines) == 3
    assert any(line.startswith("INFO attention bert_base, mask none, torch's choice: forward ") for line in lines)
    for name in ("standard_seed-1", "raptr_seed-1", "half_seed-1"):
        assert any(re.match(rf"INFO ul2_125m {name}: held-out loss \d.* after 8 steps", line) for line in lines)
        assert "eval_loss" in (out / "ul2_125m" / f"{name}.jsonl").read_text()
    assert sum(line.startswith("| raptr_ds |") for line in lines) == 3
    assert re.search(r"test_losses\[bert_zero_1\]: exit code 0 .*, off bert by ", summary)
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(results) == sum(line.startswith(("OK ", "INFO ")) for line in lines)
    assert sorted(path.name for path in out.iterdir()) == [
        "bench_bert_base.md",
        "logs.tgz",
        "profile_ul2_1b.txt",
        "results.jsonl",
        "summary.txt",
        "ul2_125m",
    ]
    with tarfile.open(out / "logs.tgz") as archive:
        assert {f"./{step}.log" for step in STEPS} <= set(archive.getnames())
    profile = (out / "profile_ul2_1b.txt").read_text()
    assert re.search(r"^matrix products +[\d.]+ ms", profile, re.M)
