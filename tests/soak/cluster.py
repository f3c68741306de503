"""The disturbed run as a job of slurm/bert_raptr.sbatch on a real Slurm: it takes two of three logical nodes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.integration.conftest import REPOSITORY
from tests.processes import all_processes, is_rank, send, variables_of, words_of
from tests.slurm.lab import SlurmLab
from tests.soak.faults import Fault, fill_disk

_SCRIPT = REPOSITORY / "slurm" / "bert_raptr.sbatch"
_STATES_OF_AN_END = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY"}
_REQUEUE_SECONDS = 60.0  # a job is FAILED for a moment before a guard or the controller requeues it


class Clustered:
    """A job that requeues itself."""

    longest_pause = 50.0

    def __init__(self, run: Path, save: Path, log: Path) -> None:
        self.save, self._log = save, log
        self._lab = SlurmLab(nodes=3).__enter__()
        env = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{self._lab.env['PATH']}",
            "RAPTR_VENV": sys.prefix if (Path(sys.prefix) / "bin" / "activate").exists() else "",
            "OMP_NUM_THREADS": "1",
            "RAPTR_CONFIG": str(run),
            "RAPTR_RETRY_DELAY": "1",
            "RAPTR_MAX_RETRIES": "6",
            "SLURM_WAIT": "2",
        }
        self._job = self._lab.submit("--time=12:00:00", str(_SCRIPT), env=env)

    def is_done(self) -> bool:
        """Return whether the job is COMPLETED. Raises: RuntimeError if it ended as anything else."""
        deadline = time.monotonic() + _REQUEUE_SECONDS
        while (state := self._state()) in _STATES_OF_AN_END - {"COMPLETED"}:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the job is {state}: see {self._log}")
            time.sleep(1)
        return state == "COMPLETED"

    def faults(self, has_disk: bool) -> dict[str, Fault]:
        """Return what may strike."""
        faults: dict[str, Fault] = {
            "kill -9 a rank": lambda draw: send(self._ranks(), signal.SIGKILL, draw),
            "stop a rank for ever": lambda draw: send(self._ranks(), signal.SIGSTOP, draw),
            "ask the job to stop": lambda _: self._command("scancel", "--signal=USR1", "--batch", str(self._job)),
            "requeue the job": lambda _: self._command("scontrol", "requeue", str(self._job)),
            "kill -9 the batch script": lambda draw: send(self._batch("slurm_script"), signal.SIGKILL, draw),
            "kill -9 the supervisor": lambda draw: send(self._batch("tools/supervise.py"), signal.SIGKILL, draw),
            "a node loses power": self._lose_a_node,
            "the controller is gone": self._lose_the_controller,
        }
        return faults | ({"fill the disk": lambda draw: fill_disk(self.save, draw)} if has_disk else {})

    def close(self) -> None:
        """Keep the job's output, and end the cluster."""
        self._log.write_text(self._lab.output(self._job))
        self._lab.__exit__(None, None, None)

    def _state(self) -> str:
        try:
            return self._lab.job(self._job).get("JobState", "?")
        except (RuntimeError, subprocess.TimeoutExpired):  # the controller is starting
            return "?"

    def _command(self, *words: str) -> bool:
        try:
            self._lab.command(*words)
        except (RuntimeError, subprocess.TimeoutExpired):  # the job is just not in a state for this
            return False
        return True

    def _lose_a_node(self, draw: random.Random) -> bool:
        node = draw.randint(1, self._lab.nodes)
        self._lab.kill_node(node)
        time.sleep(draw.choice([0.0, 5.0, 20.0]))  # Slurm takes it for gone after 10 s
        self._lab.start_node(node)
        return True

    def _lose_the_controller(self, draw: random.Random) -> bool:
        self._lab.kill_controller()
        time.sleep(draw.uniform(0, 15))
        self._lab.start_controller()
        return True

    def _of_the_job(self) -> list[int]:
        mark = f"SLURM_JOB_ID={self._job}"
        return [process for process in all_processes() if mark in variables_of(process)]

    def _ranks(self) -> list[int]:
        return [process for process in self._of_the_job() if is_rank(process)]

    def _batch(self, word: str) -> list[int]:
        commands = {process: words_of(process) for process in self._of_the_job()}
        return [
            process
            for process, words in commands.items()
            if any(word in one for one in words) and "--guard" not in words and "srun" not in words[0]
        ]
