"""mpirun sets no RANK: the launch is read through mpi4py."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

RANKS = """\
import datetime, json, pathlib, sys, torch, torch.distributed as dist
from raptr_ds.parallel.launch import detect_launch
at = detect_launch()
dist.init_process_group("gloo", rank=at.rank, world_size=at.world_size, timeout=datetime.timedelta(seconds=40),
                        init_method=f"tcp://{at.master_addr}:{at.master_port}")
total = torch.tensor([at.rank + 1])
dist.all_reduce(total)
dist.destroy_process_group()
ended = [at.rank, at.local_rank, at.world_size, at.launcher, total.item()]
pathlib.Path(sys.argv[1], f"{at.rank}.json").write_text(json.dumps(ended))
"""


def _why_unavailable() -> str | None:
    if shutil.which("mpirun") is None:
        return "no mpirun on this machine (tools/install_system_packages.sh installs openmpi-bin)"
    probe = subprocess.run(
        [sys.executable, "-c", "from mpi4py import MPI"], capture_output=True, text=True, timeout=60, check=False
    )
    return None if probe.returncode == 0 else f"mpi4py finds no MPI library: {probe.stderr.strip()[-200:]}"


def test_two_processes_of_mpirun_meet(tmp_path: Path) -> None:
    reason = _why_unavailable()
    if reason is not None:
        pytest.skip(reason)
    (tmp_path / "ranks.py").write_text(RANKS)
    # Not inherited: what a launcher of the tests themselves may have set. The machine may have fewer than two cores.
    unwanted = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in unwanted}
    env |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    options = ["--oversubscribe", "--timeout", "50"] + (["--allow-run-as-root"] if os.geteuid() == 0 else [])
    # Each rank writes into a file of its own: mpirun may join what two ranks print into one line.
    started = subprocess.run(
        ["mpirun", *options, "-n", "2", sys.executable, str(tmp_path / "ranks.py"), str(tmp_path)],
        env=env,
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )
    assert started.returncode == 0, started.stdout + started.stderr
    ended = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert ended == [[0, 0, 2, "mpirun", 3], [1, 1, 2, "mpirun", 3]]
