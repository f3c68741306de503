"""Where the ranks of a job meet, and what a job's state allows."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from raptr_ds.runtime.events import read_events
from raptr_ds.supervise.slurm import Job, free_rendezvous_port, has_failed, hosts, rendezvous_port

REPOSITORY = Path(__file__).resolve().parents[3]
# Shows the job as a file has it, and writes down what else it was asked. Warns, as of a setting that it does not know.
SCONTROL = """#!/bin/sh
echo "scontrol: error: a warning" >&2
case "$1 $2" in
"show job") cat "{0}/job" ;;
"show hostnames") rm "{0}/deaf" 2>/dev/null && exit 1; echo node1; echo node2 ;;
*) echo "$@" >>"{0}/asked" ;;
esac
"""
SINFO = "#!/bin/sh\necho node1; echo node2; echo node3\n"
FAILING = "#!/bin/sh\necho 'scontrol: fatal: no configuration' >&2\necho half an answer\nexit 1\n"
# Asks the supervisor to stop, as Slurm does at the time limit, and leaves without a checkpoint.
AT_THE_LIMIT = "trap 'exit 75' USR1; kill -TERM $PPID; while :; do sleep 0.1; done"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with stand-ins for Slurm's commands, which are found first."""
    write(tmp_path, "scontrol", SCONTROL.format(tmp_path))
    write(tmp_path, "sinfo", SINFO)
    write(tmp_path, "srun", "#!/bin/sh\n")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def write(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(script)
    (folder / name).chmod(0o755)


def asked(folder: Path) -> str:
    """Return what scontrol was asked to do."""
    return (folder / "asked").read_text() if (folder / "asked").exists() else ""


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
    shown: str, problem: str | None, asks: bool, slurm: Path
) -> None:
    (slurm / "job").write_text(f"JobId=7 {shown} ExitCode=0:0\n")
    job = Job(7, 2, "node1", 1, "7")
    assert job.requeue() == problem
    assert job.is_requeued == (problem is None)
    assert asked(slurm) == ("requeue 7\n" if asks else "")


@pytest.mark.parametrize(
    ("array", "name"), [({}, "7"), ({"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}, "7_3")]
)
def test_a_job_of_an_array_acts_on_itself_alone(slurm: Path, array: dict[str, str], name: str) -> None:
    (slurm / "job").write_text("JobId=7 JobState=RUNNING Partition=all ExcNodeList=(null)\n")
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "node2"}
    job = Job.of(variables | array)
    assert (job.number, job.start, job.node_list, job.num_nodes) == (7, 0, "node2", 1)
    assert (job.requeue(), job.change(StartTime="now+15")) == (None, None)
    assert job.exclude("node2") == "node2 failed before: excluded"
    words = f"update JobId={name}"
    assert asked(slurm) == f"requeue {name}\n{words} StartTime=now+15\n{words} ExcNodeList=node2\n"


def test_what_slurms_commands_print_of_errors_is_no_answer(slurm: Path) -> None:
    (slurm / "job").write_text("JobId=7 JobState=RUNNING Partition=all ExcNodeList=node[1-2]\n")
    job = Job(7, 0, "node[1-2]", 1, "7")
    assert hosts("node[1-2]") == ["node1", "node2"]
    assert job.exclude("node3").startswith("node3 failed before, but without it there are 0 nodes for 1")
    write(slurm, "sinfo", FAILING)
    assert job.exclude("node3") == "node3 failed before, but Slurm does not show which other nodes are up: kept"
    write(slurm, "scontrol", FAILING)
    assert (hosts("node[1-2]"), job.show()) == ([], {})
    assert job.change(Comment="x") == "scontrol: fatal: no configuration"
    assert asked(slurm) == ""


def test_a_scontrol_that_fails_once_is_asked_again_where_the_ranks_meet(slurm: Path) -> None:
    (slurm / "deaf").touch()
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "RAPTR_MAX_RETRIES": "0"}
    words = [sys.executable, str(REPOSITORY / "tools" / "supervise.py"), "--slurm", "--folder", str(slurm / "run")]
    command = [*words, "--", "bash", "-c", "echo $MASTER_ADDR; exit 75"]
    done = subprocess.run(command, env={**os.environ, **job}, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (75, "node1\n"), done.stderr
    assert "scontrol does not show the hosts of node[1-2], again in 1 s" in done.stderr


def test_a_time_limit_without_progress_ends_the_job_as_other_stops_do(slurm: Path) -> None:
    (slurm / "job").write_text("JobId=7 JobState=RUNNING Reason=TimeLimit Restarts=0\n")
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "node1", "RAPTR_MAX_RETRIES": "1"}
    words = [sys.executable, str(REPOSITORY / "tools" / "supervise.py"), "--slurm", "--folder", str(slurm / "run")]
    printed = []
    for start in range(2):
        env = {**os.environ, **job, "SLURM_RESTART_COUNT": str(start)}
        command = [*words, "--", "bash", "-c", AT_THE_LIMIT]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 75, done.stderr
        printed.append(done.stderr)
    assert "the time limit is reached: back to the queue" in printed[0]
    assert "not tried again, since 2 starts brought no new checkpoint (RAPTR_MAX_RETRIES=1)" in printed[1]
    assert asked(slurm).count("requeue 7") == 1
    assert [event["event"] for event in read_events(slurm / "run")] == ["launch", "restart", "launch", "give_up"]
