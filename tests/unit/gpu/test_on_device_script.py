"""The measuring kit's script: no step stops the next, and each leaves what it found, and nothing running."""

import os
import re
import stat
import subprocess
from pathlib import Path

from tests.gpu.kit.carried import REPOSITORY

# A Python that runs in place of the real one: `-m` steps come to what their module's name says.
PYTHON = """#!/usr/bin/env bash
case "$*" in
    *measure_ceilings*) echo "INFO copy: 1 TB/s" ;;
    *measure_attention*) echo "OK one"; echo "BAD two: wrong"; exit 1 ;;
    *test_environment*) echo "a log"; echo "no such module"; exit 2 ;;
    *ul2_1b*) sleep 300 & echo "OK it left process $!" ;;
esac
"""


SLOW_PYTHON = """#!/usr/bin/env bash
echo "OK first: in time"
sleep 300
echo "OK second: too late"
"""


def run_steps(tmp_path: Path, *steps: str, script: str = PYTHON, **variables: str) -> tuple[int, list[str]]:
    python = tmp_path / "python"
    python.write_text(script)
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    out = tmp_path / "out"
    done = subprocess.run(
        ["bash", "tests/gpu/kit/on_device.sh", *steps],
        cwd=REPOSITORY,
        env={**os.environ, "KIT_DEVICE": "cpu", "KIT_PYTHON": str(python), "OUT": str(out), **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert sorted(path.name for path in out.iterdir()) == ["logs.tgz", "results.jsonl", "summary.txt"], done.stderr
    return done.returncode, (out / "summary.txt").read_text().splitlines()


def test_a_step_that_fails_says_so_and_the_next_runs(tmp_path: Path) -> None:
    code, lines = run_steps(tmp_path, "environment", "ceilings", "attention")
    assert code == 1
    shown = [re.sub(r"after \d+ s", "after 0 s", line) for line in lines[1:-1]]
    assert shown == [
        "== environment: exit code 2 after 0 s of 60",
        "BAD environment: exit code 2; the end of its log:",
        "    a log",
        "    no such module",
        "== ceilings: exit code 0 after 0 s of 40",
        "INFO copy: 1 TB/s",
        "== attention: exit code 1 after 0 s of 60",
        "OK one",
        "BAD two: wrong",
    ]
    assert lines[-1].endswith("1 good, 2 bad")


def test_a_step_out_of_time_leaves_what_it_found(tmp_path: Path) -> None:
    code, lines = run_steps(
        tmp_path, "ceilings", "attention", script=SLOW_PYTHON, KIT_SECONDS="16"
    )  # 10 are needed: a busy machine may begin late
    assert code == 1
    text = "\n".join(lines)
    assert re.search(
        r"== ceilings: exit code 124 after \d+ s of 1\d, out of time\nOK first: in time\nBAD ceilings", text
    )
    assert "too late" not in text
    assert "== attention: skipped" in text


def test_what_a_step_leaves_running_is_ended(tmp_path: Path) -> None:
    """It would slow down what is measured next."""
    code, lines = run_steps(tmp_path, "ul2_1b")
    assert code == 0
    (left,) = re.findall(r"^OK it left process (\d+)$", "\n".join(lines), re.M)
    status = Path(f"/proc/{left}/stat")
    assert not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"  # ended, and not yet reaped
