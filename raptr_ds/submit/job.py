"""The batch file of a submission and sbatch's command. Names in them are quoted, or are words that no shell sees."""

import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from raptr_ds.errors import ConfigError
from raptr_ds.submit.container import ContainerWords
from raptr_ds.submit.layout import JobLayout

_BATCH_FILE = """\
#!/bin/bash
# Made by tools/submit.py, which also gives sbatch its options. The rest is in slurm/training_job.sh of the copied code.
export RAPTR_HOME={home} RAPTR_CODE={code} RAPTR_VENV={venv}
export RAPTR_SIGNAL_LEAD={lead} RAPTR_ARGS= SLURM_RESTART_COUNT=${{SLURM_RESTART_COUNT:-0}}
run_files=({run_files})
export RAPTR_CONFIG=${{run_files[${{SLURM_ARRAY_TASK_ID:-0}}]}}
step_options=({step_options})
task_words=({task_words})
source "$RAPTR_CODE/slurm/training_job.sh" || exit 2
"""


@dataclass(frozen=True)
class Submission:
    """What is submitted. home: the folder that relative paths count from. venv: to activate, or empty."""

    name: str
    folder: Path
    layout: JobLayout
    home: Path
    code: Path
    venv: str
    run_files: tuple[Path, ...]
    is_array: bool = False
    chain: int = 1
    partition: str | None = None
    more_options: tuple[str, ...] = ()
    container: ContainerWords = field(default_factory=ContainerWords)

    def batch_file(self) -> str:
        """Return the batch file's text."""
        return _BATCH_FILE.format(
            home=shlex.quote(str(self.home)),
            code=shlex.quote(str(self.code)),
            venv=shlex.quote(self.venv),
            lead=self.layout.lead_seconds,
            run_files=shlex.join(map(str, self.run_files)),
            step_options=shlex.join(self.container.step),
            task_words=shlex.join(self.container.task),
        )

    def command(self, batch_file: Path) -> list[str]:
        """Return sbatch's words. Slurm replaces % in the output's name, and \\ in it (checks.py)."""
        output = "slurm-%A_%a.out" if self.is_array else "slurm-%j.out"
        words = ["sbatch", "--parsable", f"--job-name={self.name}", *self.layout.words()]
        words += [f"--chdir={self.folder.absolute()}", f"--output={output}", "--open-mode=append"]
        words += [f"--partition={self.partition}"] if self.partition else []
        words += [f"--array=0-{len(self.run_files) - 1}"] if self.is_array else []
        words += ["--no-requeue", "--dependency=singleton"] if self.chain > 1 else ["--requeue"]
        return [*words, *self.more_options, str(batch_file.absolute())]


def submit(command: Sequence[str], env: Mapping[str, str]) -> str:
    """Submit, and return the job's number. Raises: ConfigError with sbatch's own words."""
    try:
        done = subprocess.run(command, env=dict(env), capture_output=True, text=True, timeout=120, check=False)
    except FileNotFoundError as error:
        raise ConfigError(
            "there is no sbatch here. Submit from a login node, or see the command by --dry-run."
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            "sbatch did not answer within two minutes: see squeue --me whether the job is there."
        ) from error
    if done.returncode:
        raise ConfigError(f"{shlex.join(command)} failed: {done.stderr.strip()}")
    return done.stdout.strip().splitlines()[-1].split(";")[0]
