"""The kernels compile for Hopper, on a machine without a GPU: tensor cores are used and registers suffice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_SHARED_BYTES = 227 * 1024  # what a block of an H100 or H200 can have
ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_kernels_fit_hopper(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.hopper"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = json.loads(done.stdout.splitlines()[-1])
    assert len(kernels) == 20
    for kernel in kernels:
        assert kernel["stack_bytes"] == 0, kernel
        assert kernel["shared_bytes"] <= _SHARED_BYTES, kernel
        assert (kernel["tensor_core_products"] > 0) == ("D" in kernel), kernel
