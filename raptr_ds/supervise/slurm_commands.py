"""Slurm's commands: run, and their answers read."""

import shlex
import subprocess
from collections.abc import Mapping, Sequence

from raptr_ds.errors import ConfigError


def run_slurm(*words: str) -> tuple[int, str]:
    """Run one of Slurm's commands; return its exit code and what it printed."""
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, str(error)
    return done.returncode, done.stdout.decode(errors="replace")


def sbatch(command: Sequence[str], without_sbatch: str, env: Mapping[str, str] | None = None) -> str:
    """Run sbatch --parsable ..., and return the job's number.

    without_sbatch: what to do where Slurm is not installed, for the message. env: by default this process's own.
    Raises: ConfigError with sbatch's own words.
    """
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
