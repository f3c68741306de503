"""A step of its own beside the training, for the end that the batch script cannot judge: its own, by kill -9.

Slurm ends such a job as failed, but gives its steps time to leave: enough to put it back into the queue.
"""

import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from raptr_ds.supervise.command import StopRequests
from raptr_ds.supervise.policy import KILLED, Ending, Limits
from raptr_ds.supervise.slurm import Job, has_failed
from raptr_ds.supervise.supervisor import Supervised

# It takes part of what the training's step has, and prints nothing: Slurm's words on its end would confuse.
_OPTIONS = "--overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task=1 --mem=0 --gres=none --mpi=none --quiet"


def start_guard(words: Sequence[str], env: Mapping[str, str]) -> None:
    """Start the guard's command in a step; a Slurm that refuses it (before 20.11) leaves the job without one."""
    silent = subprocess.DEVNULL
    command = ["srun", *_OPTIONS.split(), *words]
    subprocess.Popen(command, env=dict(env), stdin=silent, stdout=silent, stderr=silent, process_group=0)


def guard(folder: Path, limits: Limits, job: Job, stops: StopRequests) -> None:
    """Wait for the job to end; if nobody judged this start of it, do it here."""
    while stops.wait(3600) != signal.SIGTERM:
        pass
    run = Supervised(folder, str(job.number), limits)
    for _ in range(10):  # a supervisor that lives knows better
        if run.is_judged(job.start):
            return
        time.sleep(0.1)
        run = Supervised(folder, str(job.number), limits)
    if not has_failed(job.show()):
        return
    _, decision = run.judge(job.start, Ending(KILLED))
    if decision.retry and (problem := job.requeue()):
        run.write("give_up", start=job.start, cause="not requeued", why=problem)
