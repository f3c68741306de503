"""Programs beside the training: their end, their words, what they see, and that they never outlive the run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raptr_ds.runtime import side_process
from raptr_ds.runtime.side_process import SideProcess

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Starts a program of some lines as a tool."""
    monkeypatch.setattr(side_process, "TOOLS", tmp_path)

    def begin(code: str, *words: str, seconds: float = 60.0, **options: object) -> SideProcess:
        (tmp_path / "tool.py").write_text(code)
        return SideProcess(["tool.py", *words], tmp_path / "log", seconds, **options)  # type: ignore[arg-type]

    return begin


def test_success_has_no_words(start, tmp_path: Path) -> None:
    end = start("import sys; print(sys.argv[1], sys.stdin.read())", "a b", text="c" * 100_000).wait()
    assert (end.failure, end.is_mistake) == (None, False)
    assert (tmp_path / "log").read_text() == f"a b {'c' * 100_000}\n"


@pytest.mark.parametrize(
    ("code", "failure", "is_mistake"),
    [
        ("print('x'); print('error: this\\nand that', file=sys.stderr); sys.exit(2)", "this\nand that", True),
        ("raise KeyError('x')", "KeyError: 'x'", False),
        ("sys.exit(3)", "exit code 3", False),
        ("import os; os.kill(os.getpid(), 9)", "exit code -9", False),
    ],
    ids=["mistake", "fault", "silent", "killed"],
)
def test_failures_in_their_own_words(start, tmp_path: Path, code: str, failure: str, is_mistake: bool) -> None:
    (tmp_path / "log").write_text("error: of an earlier one\n")
    end = start(f"import sys; {code}").wait()
    assert (end.failure, end.is_mistake) == (failure, is_mistake)


def test_what_takes_too_long_is_ended(start) -> None:
    process = start("import time; time.sleep(60)", seconds=0.3)
    assert process.poll() is None
    assert process.wait().failure == "not done within 0.3 s"


def test_it_is_no_rank_sees_no_gpu_and_has_the_lowest_priority(start, tmp_path, monkeypatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "SLURM_PROCID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("HF_HOME", "kept")
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "SLURM_PROCID"]
    code = f"import os; print([os.environ.get(n) for n in {names}], os.environ['HF_HOME'], os.nice(0), end=' ')\n"
    code += "print(repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    assert start(code).wait().failure is None
    assert start(code, sees_gpus=True).wait().failure is None
    none = [None] * len(names)
    assert (tmp_path / "log").read_text() == f"{none} kept 19 ''\n{none} kept 19 '3'\n"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_dies_with_its_parent(tmp_path: Path, number: int) -> None:
    (tmp_path / "tool.py").write_text("import os, time; print(os.getpid(), flush=True); time.sleep(100)")
    parent = "import time\nfrom pathlib import Path\nfrom raptr_ds.runtime import side_process\n"
    parent += f"side_process.TOOLS = folder = Path({str(tmp_path)!r})\n"
    parent += "side_process.SideProcess(['tool.py'], folder / 'log', 60.0)\ntime.sleep(100)"
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=REPOSITORY)
    log, deadline = tmp_path / "log", time.monotonic() + 60
    while not (log.exists() and log.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, number)
    process.wait()
    child = Path("/proc", log.read_text().strip())
    while child.exists() and "\nState:\tZ" not in (child / "status").read_text():
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.02)
