"""Crashes, kills and outages on a real Slurm: the job comes back while its checkpoints advance, and ends with a reason.

The tasks are stand-ins for pretrain.py; test_pretrain.py kills a rank of the real one.
"""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from raptr_ds.checkpoint.folder import CHECKPOINTS, step_folder
from raptr_ds.checkpoint.manifest import MANIFEST
from raptr_ds.supervise.slurm import free_rendezvous_port, rendezvous_port
from tests.slurm.stand_in import Job

# A task's rank and start, its checkpoints, and how rank 1 dies.
BEGINNING = """\
import os, pathlib, signal, socket, sys, time
rank, start = int(os.environ["SLURM_PROCID"]), int(os.environ.get("SLURM_RESTART_COUNT", 0))
def save(step):
    folder = pathlib.Path("run/checkpoints", f"step-{step:08d}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").touch()
def wait():
    while True:
        time.sleep(0.1)
print(f"task {rank} start {start} on {socket.gethostname()} port {os.environ['MASTER_PORT']}", flush=True)
"""
# Every start but the last saves one checkpoint more, and then rank 1 is killed.
ADVANCING = (
    BEGINNING
    + """
if start == 6:
    sys.exit()
if rank == 0:
    save(10 * (start + 1))
    wait()
time.sleep(0.3)
os.kill(os.getpid(), signal.SIGKILL)
"""
)
DYING = (
    BEGINNING
    + """
if rank == 0:
    wait()
os.kill(os.getpid(), signal.SIGKILL)
"""
)


@pytest.fixture(autouse=True)
def run_file(job: Job) -> None:
    """A run file whose run goes to `run`, with what shortens the tests."""
    run = job.folder / "run.json"
    run.write_text('{"raptr_ds": {"train": {"save": "elsewhere"}}}')
    job.env |= {"RAPTR_CONFIG": "run.json", "RAPTR_ARGS": "--set raptr_ds.train.save=run", "SLURM_WAIT": "1"}


def _events(job: Job, kind: str) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in (job.folder / "run" / "events.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == kind]


def test_a_killed_rank_is_retried_as_often_as_checkpoints_advance(job: Job) -> None:
    number = job.submit(ADVANCING.replace("== 6", "== 2"), RAPTR_MAX_RETRIES="0")
    told = job.lab.wait_for(number)
    assert (told["JobState"], told["Restarts"]) == ("COMPLETED", "2"), job.lab.output(number)
    assert [event["step"] for event in _events(job, "launch")] == [0, 10, 20]
    restarts = _events(job, "restart")
    assert [(event["cause"], event["node"], event["step"]) for event in restarts] == [
        ("fault", "node2", 10),
        ("fault", "node2", 20),
    ]
    assert {event["job"] for event in restarts} == {str(number)}
    # Two nodes are left for two tasks without an excluded one, so it is kept.
    assert "node2 failed before, but without it there are 1 nodes for 2: kept" in job.lab.output(number)


def test_a_rank_that_dies_every_time_ends_the_job_with_the_reason(job: Job) -> None:
    number = job.submit(DYING, RAPTR_MAX_RETRIES="1")
    told = job.lab.wait_for(number)
    why = "a fault ended the step: not tried again, since 2 starts brought no new checkpoint (RAPTR_MAX_RETRIES=1)."
    assert (told["JobState"], told["ExitCode"], told["Restarts"]) == ("FAILED", "137:0", "1"), job.lab.output(number)
    assert why in job.lab.output(number)
    assert why in job.lab.command("scontrol", "show", "job", str(number)), "the job's comment"
    assert [event["why"] for event in _events(job, "ended")] == [why]


def test_a_node_on_which_a_rank_died_twice_is_excluded(job: Job) -> None:
    dying = BEGINNING + "\nif socket.gethostname() == 'node1':\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    number = job.submit(dying, "--nodes=1", RAPTR_MAX_RETRIES="3")
    told = job.lab.wait_for(number)
    output = job.lab.output(number)
    assert (told["JobState"], told["Restarts"]) == ("COMPLETED", "2"), output
    assert told["ExcNodeList"] == "node1"
    assert "node1 failed before: excluded" in output
    assert [event["nodes"] for event in _events(job, "launch")] == ["node1", "node1", "node2"]


def test_the_delay_grows_from_retry_to_retry(job: Job) -> None:
    job.submit(DYING, RAPTR_RETRY_DELAY="3000")
    number = int(job.lab.command("squeue", "-h", "-o", "%i"))
    job.lab.wait_for_output(number, "the next start waits 3000 s or more")
    told = job.lab.wait_for(number, "PENDING")
    assert told["Reason"] == "BeginTime"
    begins = time.mktime(time.strptime(told["StartTime"], "%Y-%m-%dT%H:%M:%S"))
    assert begins - time.time() == pytest.approx(3000, abs=60)


def test_a_mistake_of_one_rank_is_not_retried_though_the_others_are_killed(job: Job) -> None:
    number = job.submit(BEGINNING + "\nsys.exit(2) if rank else wait()\n")
    told = job.lab.wait_for(number)
    assert (told["JobState"], told["Restarts"]) == ("FAILED", "0"), job.lab.output(number)
    assert "the run file or its data is wrong" in job.lab.output(number)


def test_stops_without_progress_end_too(job: Job) -> None:
    number = job.submit(BEGINNING + "\nsys.exit(75)\n", RAPTR_MAX_RETRIES="1")
    told = job.lab.wait_for(number)
    assert (told["JobState"], told["Restarts"]) == ("FAILED", "1"), job.lab.output(number)
    assert "The time limit may be too short" in job.lab.output(number)


def test_a_controller_that_does_not_answer_is_waited_for(job: Job, tmp_path: Path) -> None:
    # At first after the step it answers nothing at all, then not to the requeue itself.
    deaf = tmp_path / "bin" / "scontrol"
    deaf.parent.mkdir()
    deaf.write_text(
        "#!/bin/bash\n"
        'if [ -e stopped ] && { ! [ -e once ] || { [ "$1" = requeue ] && ! [ -e twice ]; }; }; then\n'
        "    if [ -e once ]; then touch twice; else touch once; fi\n"
        "    echo 'Unable to contact slurm controller (connect failure)' >&2\n"
        "    exit 1\n"
        "fi\n"
        'PATH=${PATH#*:} exec scontrol "$@"\n'
    )
    deaf.chmod(0o755)
    program = BEGINNING + "\nopen('stopped', 'w').close()\nsys.exit(0 if start else 75)\n"
    number = job.submit(program, PATH=f"{deaf.parent}{os.pathsep}{job.env['PATH']}")
    told = job.lab.wait_for(number)
    output = job.lab.output(number)
    assert (told["JobState"], told["Restarts"]) == ("COMPLETED", "1"), output
    assert "requeue: no success yet, again in 2 s" in output
    assert (tmp_path / "twice").exists()


def test_a_port_that_is_taken_is_left_for_another(job: Job) -> None:
    # Rank 0 finds the port taken after it was chosen; the retry is no start of the job.
    program = BEGINNING + (
        "\nif rank == 0 and not os.path.exists('met'):\n"
        "    open('met', 'w').close()\n"
        "    taken = socket.create_server(('', int(os.environ['MASTER_PORT'])))\n"
        "    socket.create_server(('', int(os.environ['MASTER_PORT'])))\n"
    )
    number = job.submit(program, RAPTR_MAX_RETRIES="0")
    told = job.lab.wait_for(number)
    output = job.lab.output(number)
    assert (told["JobState"], told["Restarts"]) == ("COMPLETED", "0"), output
    ports = {line.split()[-1] for line in output.splitlines() if line.startswith("task 1 ")}
    assert len(ports) == 2
    assert [event["cause"] for event in _events(job, "restart")] == ["port taken"]


def test_the_time_limit_without_an_early_signal_requeues_the_job(job: Job) -> None:
    program = BEGINNING + (
        "\nif start:\n    sys.exit()\n"
        "signal.signal(signal.SIGUSR1, signal.SIG_IGN)\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1.5), save(10), os._exit(75)))\n"
        "wait()\n"
    )
    number = job.submit(program)
    job.lab.wait_for_output(number, "task 0 start 0")
    job.lab.wait_for_output(number, "task 1 start 0")
    # The shortest limit that can be asked for is a minute, and Slurm looks every 30 s.
    job.lab.command("scontrol", "update", f"JobId={number}", "EndTime=now+1")
    told = job.lab.wait_for(number)
    assert (told["JobState"], told["Restarts"]) == ("COMPLETED", "1"), job.lab.output(number)
    assert "the time limit is reached: back to the queue" in job.lab.output(number)
    assert [event["step"] for event in _events(job, "launch")] == [0, 10]


@pytest.mark.parametrize("whom", ["slurm_script", "tools/supervise.py"])
def test_a_killed_batch_script_is_requeued(job: Job, whom: str) -> None:
    number = job.submit(BEGINNING + "\nif start:\n    sys.exit()\nwait()\n")
    job.lab.wait_for_output(number, "task 0 start 0")
    job.lab.wait_for_output(number, "task 1 start 0")
    job.lab.wait_for_steps(number, 2)
    time.sleep(1)  # the guard's Python starts
    os.kill(_process_of(number, whom), signal.SIGKILL)
    # It is FAILED for a moment; the tasks' end comes first.
    job.lab.wait_for_output(number, "task 0 start 1", final=())
    told = job.lab.wait_for(number)
    assert (told["JobState"], told["Restarts"]) == ("COMPLETED", "1"), job.lab.output(number)
    assert {event["code"] for event in _events(job, "restart")} <= {137, 143}
    assert [event["cause"] for event in _events(job, "ended")] == ["done"]


def _process_of(job: int, word: str) -> int:
    """Return the process of the job's batch script with `word` in its command, seen from outside of the cluster."""
    for folder in Path("/proc").iterdir():
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
            is_batch = f"SLURM_JOB_ID={job}".encode() in variables and b"SLURM_PROCID=0" in variables
            command = (folder / "cmdline").read_bytes()
            if is_batch and word.encode() in command and b"--guard" not in command and b"srun" not in command[:5]:
                return int(folder.name)
        except OSError:  # no process, or gone meanwhile
            continue
    raise AssertionError(f"job {job} runs no {word}")


def test_ports_differ_between_the_starts_of_neighbouring_jobs() -> None:
    ports = [rendezvous_port(job, start) for job in range(1000, 1200) for start in range(61)]
    assert len(set(ports)) == len(ports)
    assert min(ports) >= 15000
    assert max(ports) < 30000


def test_checkpoints_are_named_as_the_stand_ins_name_them() -> None:
    assert step_folder(Path("run", CHECKPOINTS), 10) / MANIFEST == Path("run/checkpoints/step-00000010/manifest.json")
    assert free_rendezvous_port(1, 2) >= 15000
