"""Where the ranks of a job meet, and what a job's state allows."""

import socket

import pytest

from raptr_ds.supervise.slurm import free_rendezvous_port, has_failed, rendezvous_port


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
