"""Where the ranks of a job meet, and what a job's state allows."""

import os
import socket
from pathlib import Path

import pytest

from raptr_ds.supervise.slurm import Job, free_rendezvous_port, has_failed, rendezvous_port

# Shows the job as a file has it, and writes down what else it was asked.
SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then cat "{0}/job"; else echo "$@" >>"{0}/asked"; fi
"""


def test_ports_differ_between_the_starts_of_neighbouring_jobs() -> None:
    ports = [rendezvous_port(job, start) for job in range(1000, 1200) for start in range(61)]
    assert len(set(ports)) == len(ports)
    assert min(ports) >= 15000
    assert max(ports) < 30000


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::")])
def test_a_port_with_a_listener_is_passed_over(family: socket.AddressFamily, host: str) -> None:
    port = free_rendezvous_port(7, 3)
    with socket.create_server((host, port), family=family):
        other = free_rendezvous_port(7, 3)
        assert other != port
        assert other in {rendezvous_port(7, 3, attempt) for attempt in range(1, 20)}


@pytest.mark.parametrize(
    ("reason", "failed"),
    [
        ("TimeLimit", True),
        ("JobLaunchFailure", True),
        ("NonZeroExitCode", True),
        ("RaisedSignal:9(Killed)", True),
        ("None", False),
        ("Resources", False),
        ("", False),
    ],
)
def test_a_job_without_a_reason_for_its_end_was_cancelled(reason: str, failed: bool) -> None:
    assert has_failed({"JobState": "COMPLETING", "Reason": reason}) == failed
    assert not has_failed({})


@pytest.mark.parametrize(
    ("shown", "problem", "asks"),
    [
        ("JobState=RUNNING Reason=None Restarts=2", None, True),
        ("JobState=COMPLETING Reason=NonZeroExitCode Restarts=2", None, True),
        # Slurm itself did, as a node was lost, and counts it later; or an operator.
        ("JobState=PENDING Reason=BeginTime Restarts=2", None, False),
        ("JobState=REQUEUED Reason=NodeDown Restarts=2", None, False),
        ("JobState=RUNNING Reason=None Restarts=3", None, False),
        ("JobState=CANCELLED Reason=None Restarts=2", "the job is CANCELLED: cancelled", False),
        ("JobState=COMPLETING Reason=None Restarts=2", "the job is COMPLETING: cancelled", False),
    ],
)
def test_a_job_is_requeued_once_and_not_when_it_was_cancelled(
    shown: str, problem: str | None, asks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(SCONTROL.format(tmp_path))
    scontrol.chmod(0o755)
    (tmp_path / "job").write_text(f"JobId=7 {shown} ExitCode=0:0\n")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    job = Job(7, 2, "node1", 1)
    assert job.requeue() == problem
    assert job.is_requeued == (problem is None)
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 7\n" if asks else "")
