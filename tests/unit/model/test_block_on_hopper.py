"""Layers compile for Hopper, on a machine without a GPU: as few kernels as docs/performance.md counts on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
REASON = "needs torch 2.11's build for CUDA, whose questions to a driver tests/hopper_block.py answers"
KERNELS = {("bert", "forward"): 6, ("bert", "backward"): 18, ("ul2", "forward"): 5, ("ul2", "backward"): 9}


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is None or not torch.__version__.startswith("2.11."), reason=REASON)
@pytest.mark.parametrize("architecture", ["bert", "ul2"])
def test_a_layer_is_a_few_kernels(architecture: str) -> None:
    environment = {**os.environ}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.hopper_block", architecture]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert len(rows) == 4
    for row in rows:
        assert 0 < row["kernels"] <= KERNELS[row["layer"], row["pass"]], row
        assert row["products"] == (4 if row["pass"] == "forward" else 8), row  # SwiGLU's two are one
