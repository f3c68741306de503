"""Slurm's commands: run, and their answers read."""

import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raptr_ds.errors import ConfigError

# What a job has in its environment that would be another job's there: sbatch hands it on, and Slurm replaces only what
# the new job has itself, which is no array, say, or was not requeued yet.
_OF_A_JOB = re.compile(
    r"SLURM_(ARRAY_\w+|RESTART_COUNT|CPUS_PER_TASK|NTASKS\w*|NPROCS|GPUS\w*|MEM_PER_\w+|TRES_PER_TASK)"
)


@dataclass(frozen=True)
class Answer:
    """What one of Slurm's commands printed, nothing if it failed; and why it did, in its words, None if it did not."""

    text: str = ""
    problem: str | None = None


def run_slurm(*words: str) -> Answer:
    """Run one of Slurm's commands, a minute at most."""
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Answer(problem=str(error))
    if done.returncode:
        printed = done.stderr.strip() or done.stdout.strip()
        return Answer(problem=printed.decode(errors="replace") or f"{words[0]} ended with code {done.returncode}")
    return Answer(done.stdout.decode(errors="replace"))  # beside warnings on standard error


def sbatch(command: Sequence[str], without_sbatch: str, env: Mapping[str, str]) -> str:
    """Run sbatch --parsable ..., and return the job's number.

    without_sbatch: what to do where Slurm is not installed, for the message. env: this process's own; what the job that
    it runs in has there is left out.
    Raises: ConfigError with sbatch's own words.
    """
    if "SLURM_JOB_ID" in env:
        env = {name: value for name, value in env.items() if not _OF_A_JOB.fullmatch(name)}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    except FileNotFoundError as error:
        raise ConfigError(f"there is no sbatch here. {without_sbatch}") from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            "sbatch did not answer within two minutes: see squeue --me whether the job is there."
        ) from error
    if done.returncode:
        raise ConfigError(f"{shlex.join(command)} failed: {done.stderr.strip()}")
    return done.stdout.strip().splitlines()[-1].split(";")[0]
