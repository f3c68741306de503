"""What launchers print of tasks that failed."""

import pytest

from raptr_ds.supervise.command import Reports
from raptr_ds.supervise.policy import Failure


@pytest.mark.parametrize(
    ("lines", "first"),
    [
        (["loss 1.0"], None),
        (["srun: error: node2: task 1: Killed"], Failure("node2", None, "Killed")),
        (
            ["srun: error: a-1.b: task 12: Exited with exit code 75", "srun: error: c: task 0: Killed"],
            Failure("a-1.b", 75, "exit code 75"),
        ),
        (["srun: error: node[1-2]: tasks 0-1: Exited with exit code 2"], Failure(None, 2, "exit code 2")),
        (["srun: error: n1,n3: tasks 0,2: Terminated"], Failure(None, None, "Terminated")),
        (
            ["progress 10%srun: error: n1: task 0: Segmentation fault (core dumped)"],
            Failure("n1", None, "Segmentation fault (core dumped)"),
        ),
        (["srun: error: Node failure on node3"], Failure("node3", None, "node failure")),
        (["srun: error: Unable to create step for job 3: Job/step already completing or completed"], None),
        (["slurmstepd-node1: error: *** STEP 3.0 ON node1 CANCELLED AT 2026-11-28T14:36:43 ***"], None),
    ],
)
def test_the_first_failed_task_is_found(lines: list[str], first: Failure | None) -> None:
    reports = Reports()
    for line in lines:
        reports.read(line)
    assert (reports.failures or [None])[0] == first


@pytest.mark.parametrize(("code", "expected"), [("2", 2), ("1", 1), ("-9", None)])
def test_torchruns_line_shows_the_code_that_it_hides(code: str, expected: int | None) -> None:
    reports = Reports()
    reports.read(f"E1128 12:00 7 torch/api.py:875] failed (exitcode: {code}) local_rank: 1 (pid: 9) of binary: python")
    assert [failure.code for failure in reports.failures] == [expected]


@pytest.mark.parametrize(
    ("line", "taken"),
    [
        ("The server socket has failed to listen. port: 1, code: -98, name: EADDRINUSE, message: x", True),
        ("OSError: [Errno 98] Address already in use", True),
        ("OSError: [Errno 99] Cannot assign requested address", False),
    ],
)
def test_a_port_that_is_taken_is_noticed(line: str, taken: bool) -> None:
    reports = Reports()
    reports.read(line)
    assert reports.port_taken == taken


@pytest.mark.parametrize(
    ("line", "no_script"),
    [
        ("raptr_ds: ConfigError: raptr_ds.train.steps=-1", False),
        ("pretrain.py: error: unrecognized arguments: -x", False),
        ("3: python: can't open file '/x/raptr_ds/pretrain.py': [Errno 107] Transport endpoint is not connected", True),
    ],
)
def test_a_script_that_cannot_be_read_is_noticed(line: str, no_script: bool) -> None:
    reports = Reports()
    reports.read(line)
    assert (reports.no_script, reports.folder_in_use) == (no_script, False)
