"""Crashes, kills and outages on a real Slurm: the job comes back while its checkpoints advance, and ends with a reason.

The tasks are stand-ins for pretrain.py; test_pretrain.py kills a rank of the real one.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raptr_ds.checkpoint.folder import CHECKPOINTS, MANIFEST, step_folder
from tests.slurm.lab import SlurmLab
from tests.slurm.stand_in import Job

# What all tasks begin with.
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
# Each start but the third saves one checkpoint more, and then rank 1 is killed.
ADVANCING = """
if start == 2:
    sys.exit()
if rank == 0:
    save(10 * (start + 1))
    wait()
time.sleep(0.3)
os.kill(os.getpid(), signal.SIGKILL)
"""
DYING = """
if rank == 0:
    wait()
os.kill(os.getpid(), signal.SIGKILL)
"""
MISTAKEN = """
if rank == 0:
    wait()
print("raptr_ds: ConfigError: no", file=sys.stderr)
sys.exit(2)
"""
STOPPING = """
open("stopped", "w").close()
sys.exit(0 if start else 75)
"""
# Rank 0 finds the port taken after it was chosen.
TAKEN = """
if rank == 0 and not os.path.exists("met"):
    open("met", "w").close()
    taken = socket.create_server(("", int(os.environ["MASTER_PORT"])))
    socket.create_server(("", int(os.environ["MASTER_PORT"])))
"""
SLOW_TO_SAVE = """
if start:
    sys.exit()
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1.5), save(10), os._exit(75)))
wait()
"""
WAITING = "sys.exit() if start else wait()\n"
# Right after the step it does not show the job, once, and then does not requeue it, once.
DEAF_SCONTROL = """\
#!/bin/bash
case "$1 $2" in "show job") refused=once ;; requeue*) refused=twice ;; *) refused= ;; esac
if [ -e stopped ] && [ -n "$refused" ] && ! [ -e "$refused" ]; then
    touch "$refused"
    echo "Unable to contact slurm controller (connect failure)" >&2
    exit 1
fi
PATH=${PATH#*:} exec scontrol "$@"
"""
PROGRAMS = {
    "advancing": (ADVANCING, {"RAPTR_MAX_RETRIES": "0"}),
    "dying": (DYING, {"RAPTR_MAX_RETRIES": "1"}),
    "delayed": (DYING, {"RAPTR_RETRY_DELAY": "3000"}),
    "mistaken": (MISTAKEN, {}),
    "stopping": ("sys.exit(75)\n", {"RAPTR_MAX_RETRIES": "1"}),
    "deaf": (STOPPING, {}),
    "taken": (TAKEN, {"RAPTR_MAX_RETRIES": "0"}),
    "limited": (SLOW_TO_SAVE, {}),
    "slurm_script": (WAITING, {}),
    "tools/supervise.py": (WAITING, {}),
    "chained": ("sys.exit(75)\n", {"SBATCH_NO_REQUEUE": "1"}),
    "hasty": ("", {"SBATCH_TIMELIMIT": "1"}),
}


class Jobs:
    """The jobs of this file, which wait more than they compute: all are submitted at once."""

    def __init__(self, folder: Path, lab: SlurmLab) -> None:
        self.lab = lab
        self.numbers: dict[str, int] = {}
        self._folders = {name: folder / str(place) for place, name in enumerate(PROGRAMS)}
        for name, (program, env) in PROGRAMS.items():
            self.numbers[name] = self._submit(self._folders[name], program, env)

    def _submit(self, folder: Path, program: str, env: dict[str, str]) -> int:
        folder.mkdir()
        job = stand_in_job(folder, self.lab)
        scontrol = folder / "bin" / "scontrol"
        if program is STOPPING:
            scontrol.parent.mkdir()
            scontrol.write_text(DEAF_SCONTROL)
            scontrol.chmod(0o755)
        path = f"{scontrol.parent}{os.pathsep}{job.env['PATH']}"
        return job.submit(BEGINNING + program, "--job-name", folder.name, **env, PATH=path)

    def end(self, name: str) -> dict[str, str]:
        """Wait for the end of a job and return what scontrol shows of it."""
        return self.lab.wait_for(self.numbers[name], seconds=90)

    def output(self, name: str) -> str:
        """Return what a job printed."""
        return self.lab.output(self.numbers[name])

    def events(self, name: str, kind: str) -> list[dict[str, Any]]:
        """Return the events of one kind in the folder of a job's run."""
        return events_in(self._folders[name], kind)


def stand_in_job(folder: Path, lab: SlurmLab) -> Job:
    """Return a stand-in repository with a run file whose run goes to `run`, and with what shortens the tests."""
    job = Job(folder, lab)
    (folder / "run.json").write_text('{"raptr_ds": {"train": {"save": "elsewhere"}}}')
    # A task that ends at once must not end another one that a busy machine has not begun yet.
    job.env |= {"RAPTR_CONFIG": "run.json", "RAPTR_ARGS": "--set raptr_ds.train.save=run", "SLURM_WAIT": "10"}
    return job


def events_in(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Return the events of one kind."""
    lines = (folder / "run" / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.fixture(scope="module")
def jobs(_cluster: SlurmLab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    """All jobs, submitted."""
    started = Jobs(tmp_path_factory.mktemp("jobs"), _cluster)
    for name in ("limited", "slurm_script", "tools/supervise.py"):
        for rank in range(2):
            _cluster.wait_for_output(started.numbers[name], f"task {rank} start 0")
    # The shortest limit that can be asked for is a minute, and Slurm looks every 30 s.
    _cluster.command("scontrol", "update", f"JobId={started.numbers['limited']}", "EndTime=now+1")
    for name in ("slurm_script", "tools/supervise.py"):
        _cluster.wait_for_steps(started.numbers[name], 2)
    time.sleep(2)  # the guards' Python starts
    for name in ("slurm_script", "tools/supervise.py"):
        os.kill(_process_of(started.numbers[name], name), signal.SIGKILL)
    yield started
    _cluster.clear()


def test_a_killed_rank_is_retried_as_often_as_checkpoints_advance(jobs: Jobs) -> None:
    ended = jobs.end("advancing")
    output = jobs.output("advancing")
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "2"), output
    assert [event["step"] for event in jobs.events("advancing", "launch")] == [0, 10, 20]
    restarts = jobs.events("advancing", "restart")
    assert [(event["cause"], event["node"], event["step"]) for event in restarts] == [
        ("fault", "node2", 10),
        ("fault", "node2", 20),
    ]
    assert {event["job"] for event in restarts} == {ended["JobId"]}
    # Without an excluded one there would be one node for two tasks.
    assert "node2 failed before, but without it there are 1 nodes for 2: kept" in output


def test_a_rank_that_dies_every_time_ends_the_job_with_the_reason(jobs: Jobs) -> None:
    ended = jobs.end("dying")
    why = "a fault ended the step: not tried again, since 2 starts brought no new checkpoint (RAPTR_MAX_RETRIES=1)."
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "137:0", "1"), jobs.output("dying")
    assert why in jobs.output("dying")
    assert why in jobs.lab.command("scontrol", "show", "job", ended["JobId"]), "the job's comment"
    assert [event["why"] for event in jobs.events("dying", "give_up")] == [why]


def test_a_retry_without_progress_waits(jobs: Jobs) -> None:
    number = jobs.numbers["delayed"]
    jobs.lab.wait_for_output(number, "the next start waits 3000 s or more")
    ended = jobs.lab.wait_for(number, "PENDING")
    assert ended["Reason"] == "BeginTime"
    begins = time.mktime(time.strptime(ended["StartTime"], "%Y-%m-%dT%H:%M:%S"))
    assert begins - time.time() == pytest.approx(3000, abs=150)


def test_a_mistake_of_one_rank_is_not_retried_though_the_others_are_killed(jobs: Jobs) -> None:
    ended = jobs.end("mistaken")
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), jobs.output("mistaken")
    assert "the run file or its data is wrong" in jobs.output("mistaken")


def test_stops_without_progress_end_too(jobs: Jobs) -> None:
    ended = jobs.end("stopping")
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "1"), jobs.output("stopping")
    assert "The time limit may be too short" in jobs.output("stopping")


def test_a_job_that_may_not_be_requeued_says_so(jobs: Jobs) -> None:
    ended = jobs.end("chained")
    assert (ended["JobState"], ended["ExitCode"], ended["Requeue"]) == ("FAILED", "75:0", "0"), jobs.output("chained")
    assert "docs/slurm.md shows how to submit a chain" in jobs.output("chained")
    assert [event["cause"] for event in jobs.events("chained", "give_up")] == ["not requeued"]


def test_a_controller_that_does_not_answer_is_waited_for(jobs: Jobs) -> None:
    ended = jobs.end("deaf")
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), jobs.output("deaf")
    assert "requeue: no success yet, again in 2 s" in jobs.output("deaf")


def test_a_port_that_is_taken_is_left_for_another_in_the_same_start(jobs: Jobs) -> None:
    ended = jobs.end("taken")
    output = jobs.output("taken")
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), output
    assert len({line.split()[-1] for line in output.splitlines() if line.startswith("task 1 ")}) == 2
    assert [event["cause"] for event in jobs.events("taken", "restart")] == ["port taken"]


def test_the_time_limit_without_an_early_signal_requeues_the_job(jobs: Jobs) -> None:
    ended = jobs.end("limited")
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), jobs.output("limited")
    assert "the time limit is reached: back to the queue" in jobs.output("limited")
    assert [event["step"] for event in jobs.events("limited", "launch")] == [0, 10]
    # The guard, which is asked to stop at the same time, leaves it to the supervisor.
    assert [event["cause"] for event in jobs.events("limited", "restart")] == ["stopped"]


@pytest.mark.parametrize("killed", ["slurm_script", "tools/supervise.py"])
def test_a_killed_batch_script_is_requeued(jobs: Jobs, killed: str) -> None:
    jobs.lab.wait_for_output(jobs.numbers[killed], "task 0 start 1", final=())  # it is FAILED for a moment
    ended = jobs.end(killed)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), jobs.output(killed)
    assert {event["code"] for event in jobs.events(killed, "restart")} <= {137, 143}
    assert len(jobs.events(killed, "done")) == 1
    assert jobs.events(killed, "give_up") == []


def test_a_node_on_which_a_rank_died_twice_is_excluded(jobs: Jobs, tmp_path: Path) -> None:
    for name in PROGRAMS:
        if name != "delayed":
            jobs.end(name)
    dying = BEGINNING + "if socket.gethostname() == 'node1':\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    number = stand_in_job(tmp_path, jobs.lab).submit(dying, "--nodes=1")
    ended = jobs.lab.wait_for(number)
    output = jobs.lab.output(number)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "2"), output
    assert ended["ExcNodeList"] == "node1"
    assert "node1 failed before: excluded" in output
    assert [event["nodes"] for event in events_in(tmp_path, "launch")] == ["node1", "node1", "node2"]


def test_a_time_limit_that_the_signals_lead_fills_is_shown_at_the_start(jobs: Jobs) -> None:
    hasty = jobs.end("hasty")
    warning = "the time limit is 60 s, and the signal to save comes 120 s before its end"
    assert (hasty["JobState"], warning in jobs.output("hasty")) == ("COMPLETED", True), jobs.output("hasty")
    assert "Give --time=20 (minutes) or more" in jobs.output("hasty")
    assert "warning" not in jobs.output("advancing")


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


def test_checkpoints_are_named_as_the_stand_ins_name_them() -> None:
    assert step_folder(Path("run", CHECKPOINTS), 10) / MANIFEST == Path("run/checkpoints/step-00000010/manifest.json")
