"""The .sbatch files on a real Slurm: what starts, with which ranks, and what happens to each way of ending.

The tasks are stand-ins for pretrain.py, so that each case takes seconds; test_pretrain.py runs the real one.
"""

import os
import re
import time
from pathlib import Path

import pytest

from tests.slurm.lab import SlurmLab
from tests.slurm.stand_in import REPOSITORY, SCRIPTS, Job

# Says its launch and sums the ranks over gloo: every rank met every other.
RANKS = """\
import datetime, socket, sys, torch, torch.distributed as dist
from raptr_ds.parallel.launch import detect_launch
at = detect_launch()
dist.init_process_group("gloo", rank=at.rank, world_size=at.world_size, timeout=datetime.timedelta(seconds=40),
                        init_method=f"tcp://{at.master_addr}:{at.master_port}")
total = torch.tensor([at.rank + 1])
dist.all_reduce(total)
dist.destroy_process_group()
place = f"rank {at.rank} local {at.local_rank} of {at.world_size} on {socket.gethostname()}"
print(f"{place} by {at.launcher}: {total.item()} arguments", *sys.argv[1:], flush=True)
"""

# On SIGUSR1 leaves with 75, rank 1 later than rank 0; a second start finishes at once. TERM is not taken for USR1.
STOPPING = """\
import os, signal, sys, time
rank, start = int(os.environ["SLURM_PROCID"]), int(os.environ.get("SLURM_RESTART_COUNT", 0))
asked = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: asked.append(number))
print(f"task {rank} start {start} port {os.environ['MASTER_PORT']}", flush=True)
while not asked and start == 0:
    time.sleep(0.02)
time.sleep(1.0 * rank if start == 0 else 0)
print(f"task {rank} leaves start {start} after {[signal.Signals(n).name for n in asked]}", flush=True)
sys.exit(0 if start else 75)
"""

# Is killed by SIGUSR1, as a task that is still importing is; a second start finishes at once.
NOT_READY = """\
import os, time
start = int(os.environ.get("SLURM_RESTART_COUNT", 0))
print(f"task {os.environ['SLURM_PROCID']} start {start}", flush=True)
time.sleep(0 if start else 60)
"""

# Rank 0 leaves with a code, the others wait for it as in a collective.
LEAVING = """\
import os, sys, time
time.sleep(0 if os.environ["SLURM_PROCID"] == "0" else {others_wait})
if {code} == 2:
    print("raptr_ds: ConfigError: no", file=sys.stderr)
sys.exit({code})
"""

# Job 1 of an array stops once; job 0 waits until it has come back.
ARRAY = """\
import os, pathlib, sys, time
start, back = int(os.environ.get("SLURM_RESTART_COUNT", 0)), pathlib.Path("back")
if os.environ["SLURM_ARRAY_TASK_ID"] == "1":
    sys.exit(back.touch() if start else 75)
while not back.exists():
    time.sleep(0.1)
"""


def _lines(text: str, word: str) -> list[str]:
    return sorted(line for line in text.splitlines() if line.startswith(word))


@pytest.mark.parametrize("script", SCRIPTS)
def test_one_task_on_each_of_two_nodes_as_the_file_stands(job: Job, script: str) -> None:
    number = job.submit(RANKS, script=script, RAPTR_ARGS="--set a.b=1 c=2")
    ended = job.lab.wait_for(number)
    run_file = {SCRIPTS[0]: "bert_base_raptr", SCRIPTS[1]: "ul2_1b_raptr"}[script]
    arguments = f"arguments --deepspeed_config deepspeed_configs/{run_file}.json --set a.b=1 c=2"
    output = job.lab.output(number)
    assert _lines(output, "rank") == [
        f"rank 0 local 0 of 2 on node1 by srun: 3 {arguments}",
        f"rank 1 local 0 of 2 on node2 by srun: 3 {arguments}",
    ], output
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0")


def test_two_tasks_on_each_node_whatever_the_submitting_shell_had_set(job: Job) -> None:
    stale = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1"}
    number = job.submit(RANKS, "--ntasks-per-node=2", "--cpus-per-task=2", **stale)
    job.lab.wait_for(number)
    output = job.lab.output(number)
    places = [line.split(" by ")[0] for line in _lines(output, "rank")]
    assert places == [
        "rank 0 local 0 of 4 on node1",
        "rank 1 local 1 of 4 on node1",
        "rank 2 local 0 of 4 on node2",
        "rank 3 local 1 of 4 on node2",
    ], output
    assert output.count("by srun: 10 ") == 4


def test_arguments_after_the_file_reach_the_run_and_the_repository_is_found_by_the_files_place(
    lab: SlurmLab, job: Job, tmp_path: Path
) -> None:
    del job.env["RAPTR_HOME"]
    job.write("import os, sys; print(os.getcwd(), *sys.argv[3:])")
    (tmp_path / "slurm").unlink()
    (tmp_path / "slurm").mkdir()
    for file in (REPOSITORY / "slurm").iterdir():
        (tmp_path / "slurm" / file.name).symlink_to(file)
    script = str(tmp_path / "slurm" / SCRIPTS[0])
    number = lab.submit("--nodes=1", script, "--set", "name=two words", "x=1", env=job.env)
    ended = lab.wait_for(number)
    assert ended["JobState"] == "COMPLETED", lab.output(number)
    assert f"{tmp_path} --set name=two words x=1" in lab.output(number)


def test_a_stop_request_requeues_the_job_which_then_finishes(job: Job) -> None:
    number = job.submit(STOPPING)
    job.lab.wait_for_output(number, "task 0 start 0")
    job.lab.wait_for_output(number, "task 1 start 0")
    job.lab.command("scancel", "--signal=USR1", "--batch", str(number))
    ended = job.lab.wait_for(number)
    output = job.lab.output(number)
    assert _lines(output, "task 0 leaves") + _lines(output, "task 1 leaves") == [
        "task 0 leaves start 0 after ['SIGUSR1']",
        "task 0 leaves start 1 after []",
        "task 1 leaves start 0 after ['SIGUSR1']",
        "task 1 leaves start 1 after []",
    ], output
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1")
    ports = {line.split()[-1] for line in output.splitlines() if " start " in line and " port " in line}
    assert len(ports) == 2, "the requeued job must not meet at the port of its first start"


def test_a_stop_request_that_meets_unready_tasks_requeues_the_job(job: Job) -> None:
    number = job.submit(NOT_READY)
    job.lab.wait_for_output(number, "task 0 start 0")
    job.lab.command("scancel", "--signal=USR1", "--batch", str(number))
    ended = job.lab.wait_for(number)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), job.lab.output(number)


def test_a_stop_request_before_the_tasks_start_requeues_the_job(job: Job, tmp_path: Path) -> None:
    (tmp_path / "setup.sh").write_text('[ -n "$SLURM_RESTART_COUNT" ] || kill -USR1 $$\n')
    number = job.submit(STOPPING, RAPTR_SETUP=str(tmp_path / "setup.sh"))
    ended = job.lab.wait_for(number)
    output = job.lab.output(number)
    assert "stopped before it started" in output
    assert "start 0 port" not in output
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), output


def test_a_stop_request_that_srun_drops_is_made_again(job: Job, tmp_path: Path) -> None:
    # An srun that waits for something before it starts the tasks.
    slow = tmp_path / "bin" / "srun"
    slow.parent.mkdir()
    slow.write_text(
        '#!/bin/bash\ntrap : USR1\necho waiting\nsleep 1\nsleep 1\nexec /usr/bin/env PATH="${PATH#*:}" srun "$@"\n'
    )
    slow.chmod(0o755)
    number = job.submit(STOPPING, PATH=f"{slow.parent}{os.pathsep}{job.env['PATH']}")
    job.lab.wait_for_output(number, "waiting")
    job.lab.command("scancel", "--signal=USR1", "--batch", str(number))
    ended = job.lab.wait_for(number)
    output = job.lab.output(number)
    assert "task 1 leaves start 0 after ['SIGUSR1']" in output
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), output


def test_a_cancelled_job_stays_cancelled_though_its_tasks_leave_with_75(job: Job) -> None:
    number = job.submit(STOPPING)
    job.lab.wait_for_output(number, "task 0 start 0")
    job.lab.wait_for_output(number, "task 1 start 0")
    job.lab.command("scancel", str(number))
    job.lab.wait_for(number)
    job.lab.clear()
    ended = job.lab.job(number)
    output = job.lab.output(number)
    assert "SIGTERM" in _lines(output, "task 1 leaves start 0")[0]
    assert "not requeued: the job is COMPLETING: cancelled" in output
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), output


def test_a_job_that_an_operator_requeues_is_requeued_once(job: Job) -> None:
    number = job.submit(STOPPING)
    job.lab.wait_for_output(number, "task 0 start 0")
    job.lab.wait_for_output(number, "task 1 start 0")
    job.lab.command("scontrol", "requeue", str(number))
    ended = job.lab.wait_for(number)
    output = job.lab.output(number)
    assert "SIGTERM" in _lines(output, "task 1 leaves start 0")[0]
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), output


def test_a_job_of_an_array_is_requeued_without_the_others(job: Job) -> None:
    number = job.submit(ARRAY, "--array=0-1", "--nodes=1")
    deadline = time.monotonic() + 50
    while job.lab.command("squeue", "--noheader", f"--jobs={number}"):
        assert time.monotonic() < deadline, job.lab.command("squeue")
        time.sleep(0.1)
    shown = job.lab.command("scontrol", "show", "job", "-o", str(number)).splitlines()
    ended = {line["ArrayTaskId"]: line for line in (dict(re.findall(r"(\S+?)=(\S*)", text)) for text in shown)}
    assert ended["1"]["JobId"] == str(number), "the one whose number is that of the array"
    assert {task: (line["JobState"], line["Restarts"]) for task, line in ended.items()} == {
        "0": ("COMPLETED", "0"),
        "1": ("COMPLETED", "1"),
    }


@pytest.mark.parametrize(("code", "message"), [(2, "run file or its data is wrong"), (1, "a fault ended the step")])
def test_mistakes_and_faults_fail_the_job_with_their_code(job: Job, code: int, message: str) -> None:
    number = job.submit(LEAVING.format(code=code, others_wait=0), RAPTR_MAX_RETRIES="0")
    ended = job.lab.wait_for(number)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", f"{code}:0", "0")
    assert message in job.lab.output(number)


def test_a_lost_task_ends_the_others(job: Job) -> None:
    number = job.submit(LEAVING.format(code=1, others_wait=300), SLURM_WAIT="2", RAPTR_MAX_RETRIES="0")
    ended = job.lab.wait_for(number, seconds=20)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), job.lab.output(number)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RAPTR_CONFIG": "absent.json"}, "no run file RAPTR_CONFIG=absent.json"),
        ({"RAPTR_VENV": "/absent"}, "RAPTR_VENV=/absent is no virtual environment"),
        ({"SLURM_GPUS_ON_NODE": "8"}, "8 GPUs but 1 tasks on each node"),
    ],
)
def test_mistakes_of_the_submission_are_printed_before_any_task_starts(
    job: Job, env: dict[str, str], message: str
) -> None:
    number = job.submit("print('a task ran')", **env)
    ended = job.lab.wait_for(number)
    output = job.lab.output(number)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0"), output
    assert message in output
    assert "a task ran" not in output
