"""A step of its own beside the training, for the end that the batch script cannot judge: its own, by kill -9.

Slurm ends such a job as failed, but gives its steps time to leave: enough to put it back into the queue.
"""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from raptr_ds.supervise.command import StopRequests
from raptr_ds.supervise.policy import KILLED, Ending, Limits
from raptr_ds.supervise.slurm import Job, has_failed
from raptr_ds.supervise.slurm_commands import run_slurm
from raptr_ds.supervise.supervisor import Supervised

# It takes part of what the training's step has, and prints nothing: Slurm's words on its end would confuse.
_OPTIONS = "--overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task=1 --mem=0 --gres=none --mpi=none --quiet"


_KILL_WAIT = re.compile(r"^KillWait\s*=\s*(\d+) sec", re.MULTILINE)
_USUAL_KILL_WAIT = 30.0
_LAST_SECONDS = 5.0


def start_guard(words: Sequence[str], env: Mapping[str, str]) -> None:
    """Start the guard's command in a step; a Slurm that refuses it (before 20.11) leaves the job without one."""
    silent = subprocess.DEVNULL
    here = [f"--nodelist={env['SLURMD_NODENAME']}"] if "SLURMD_NODENAME" in env else []
    command = ["srun", *_OPTIONS.split(), *here, *words]
    subprocess.Popen(command, env=dict(env), stdin=silent, stdout=silent, stderr=silent, process_group=0)


def guard(folder: Path, limits: Limits, job: Job, stops: StopRequests, supervisor: int) -> None:
    """Wait for the job to end; if its supervisor ends without putting it back, do it here.

    supervisor: its process, on the same machine. As long as it lives it knows better how this start ended; but
    KillWait seconds after the job's end both are killed, and what it has not done shortly before is done here too.
    """
    watched, patience = _Watched(supervisor), _patience_seconds()
    while stops.wait(3600) != signal.SIGTERM:
        pass
    deadline = time.monotonic() + patience
    while watched.may_live() and time.monotonic() < deadline:
        if Supervised(folder, str(job.number), limits).is_over(job.start):
            return
        time.sleep(0.1)
    run = Supervised(folder, str(job.number), limits)
    if run.is_over(job.start) or job.is_back(shown := job.show()) or not has_failed(shown):
        return
    # A supervisor that has written its decision down may have been killed before it came to the requeue.
    retry = run.is_to_be_repeated(job.start) or run.judge(job.start, Ending(KILLED))[1].retry
    if retry and (problem := job.requeue()):
        run.write("give_up", start=job.start, cause="not requeued", why=problem)


class _Watched:
    """A process of this machine, for as long as it lives: its file in /proc never shows another of the same number."""

    def __init__(self, process: int) -> None:
        self._command: int | None = None
        with contextlib.suppress(OSError):
            self._command = os.open(f"/proc/{process}/cmdline", os.O_RDONLY)

    def may_live(self) -> bool:
        """Return whether it lives, or could not be found at the beginning."""
        if self._command is None:
            return True
        try:
            return bool(os.pread(self._command, 1, 0))  # nothing: it has ended, and its parent has not noticed yet
        except ProcessLookupError:
            return False


def _patience_seconds() -> float:
    """Return how long to wait after SIGTERM: less than until SIGKILL."""
    match = _KILL_WAIT.search(run_slurm("scontrol", "show", "config").text)
    kill_wait = float(match[1]) if match else _USUAL_KILL_WAIT
    return max(kill_wait / 2, kill_wait - _LAST_SECONDS)
