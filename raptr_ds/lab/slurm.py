"""A comparison as Slurm job arrays: one job a run, tuning first, then what is compared, then the report.

Each batch file is what slurm/bert_raptr.sbatch is, but for where a job's settings come from: it asks
tools/experiment.py for those of its number in the array, when it starts, since only then the tuned rates are known.
slurm/training_job.sh does the rest: srun, stops, requeueing.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from raptr_ds.errors import ConfigError
from raptr_ds.lab.plan import PlannedRun, Planner
from raptr_ds.lab.runner import REPOSITORY, Progress, choose_rates, refuse_other_runs
from raptr_ds.lab.state import state_of

_FOLDER = "slurm"

_TRAINING = """\
#!/bin/bash
# {what}, made by tools/experiment.py --slurm. Job N of the array is run N of the comparison.
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={tasks}
#SBATCH --array={array}
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={output}/%x-%a.out
{options}
export RAPTR_HOME={home}
export RAPTR_CONFIG={base}
settings=$(cd "$RAPTR_HOME" && {ask} --settings-of "$SLURM_ARRAY_TASK_ID") || exit
mapfile -t settings <<<"$settings"
set -- --set "${{settings[@]}}"
source "$RAPTR_HOME/slurm/training_job.sh" || exit 2
"""
_REPORT = """\
#!/bin/bash
# The report, made by tools/experiment.py --slurm.
#SBATCH --job-name={name}
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --output={output}/%x-%j.out
cd {home} && {ask} --report
"""


@dataclass(frozen=True)
class Jobs:
    """The batch files that are to be submitted, in this order, each after the one before has ended."""

    progress: Progress
    files: list[Path] = field(default_factory=list)


def write_jobs(planner: Planner, file: Path, overrides: Sequence[str]) -> Jobs:
    """Write batch files for the runs that are not finished into the comparison's folder.

    Where step times are still to be measured, those runs are all that is written: afterwards call this again.
    Raises: ConfigError if it is not called from the repository, from where the jobs' relative paths count, or if other
    runs are in the folders.
    """
    if Path.cwd().resolve() != REPOSITORY:
        raise ConfigError(f"--slurm works from the repository, where its jobs' relative paths count: cd {REPOSITORY}")
    planner.check()
    runs = array_runs(planner)
    known = [run for run in runs if run is not None]
    refuse_other_runs(known)
    wanted = {
        purpose: [
            number
            for number, run in enumerate(runs)
            if (run.purpose if run else "comparison") == purpose and not (run and _is_finished(run))
        ]
        for purpose in ("probe", "tuning", "comparison")
    }
    progress = Progress()
    if not wanted["probe"]:
        progress.shares = planner.shares()
        progress.tuning = planner.tuning_runs(progress.shares)
        progress.rates = choose_rates(progress.shares, progress.tuning)
        progress.comparison = [run for run in known if run.purpose == "comparison"]
    jobs = Jobs(progress)
    folder = planner.output.resolve() / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "tools/experiment.py", str(file.resolve()), *(["--set", *overrides] if overrides else [])]
    ask = " ".join(shlex.quote(word) for word in words)
    for purpose, numbers in wanted.items():
        if numbers:
            target = folder / f"{purpose}.sbatch"
            target.write_text(_training_file(planner, purpose, numbers, folder, ask), encoding="utf-8")
            jobs.files.append(target)
    if not wanted["probe"]:
        report = folder / "report.sbatch"
        name = f"{file.stem}-report"
        home = shlex.quote(str(REPOSITORY))
        report.write_text(_REPORT.format(name=name, output=folder, home=home, ask=ask), encoding="utf-8")
        jobs.files.append(report)
    return jobs


def array_runs(planner: Planner, *, as_it_stands: bool = False) -> list[PlannedRun | None]:
    """Return all runs by their number in the arrays, which never changes; None where a rate is yet to be chosen.

    as_it_stands: choose it from the tuning runs that are finished, whatever became of the others.
    """
    probes: list[PlannedRun | None] = [*planner.probes()]
    if any(run is not None and not _is_finished(run) for run in probes):
        return probes
    shares = planner.shares()
    tuning = planner.tuning_runs(shares)
    rates = choose_rates(shares, tuning, as_it_stands=as_it_stands)
    compared = [
        planner.comparison_run(share, seed, rates[share.contestant.name]) if share.contestant.name in rates else None
        for seed in planner.experiment.seeds
        for share in shares
    ]
    return [*probes, *tuning, *compared]


def settings_of(planner: Planner, number: int) -> list[str]:
    """Return the settings of a run by its number in the array. Raises: ConfigError if its rate cannot be chosen."""
    # A job that is compared starts after all that tune have ended, so those that are not finished have failed.
    runs = array_runs(planner, as_it_stands=True)
    run = runs[number] if number < len(runs) else None
    if run is None:
        raise ConfigError(
            f"run {number} has no learning rate, as no tuning run of its contestant is finished. Their output is in "
            f"{planner.output / _FOLDER}."
        )
    return list(run.settings)


def submit(jobs: Jobs, only_write: bool = False) -> list[str]:
    """Hand the batch files to sbatch, each to start after the one before; return what was done, for people.

    Raises: ConfigError if sbatch refuses.
    """
    if only_write:
        return [f"wrote {file}" for file in jobs.files]
    lines, before = [], None
    for file in jobs.files:
        command = ["sbatch", "--parsable", *([f"--dependency=afterany:{before}"] if before else []), str(file)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            raise ConfigError("there is no sbatch here. --write-only writes the batch files alone.") from error
        if done.returncode:
            raise ConfigError(f"{' '.join(command)} failed: {done.stderr.strip()}")
        before = done.stdout.strip().split(";")[0]
        lines.append(f"submitted {file} as job {before}")
    return lines


def _training_file(planner: Planner, purpose: str, numbers: Sequence[int], folder: Path, ask: str) -> str:
    experiment = planner.experiment
    job = experiment.slurm
    array = ",".join(map(str, numbers)) + (f"%{job.at_once}" if job.at_once else "")
    base = os.path.relpath(Path(experiment.base).resolve(), REPOSITORY)
    return _TRAINING.format(
        what=f"The runs of {planner.output.name}: {purpose}",
        name=f"{planner.output.name}-{purpose}",
        nodes=job.nodes,
        tasks=experiment.processes // job.nodes,
        array=array,
        output=folder,
        options="".join(f"#SBATCH {option}\n" for option in job.options),
        home=shlex.quote(str(REPOSITORY)),
        base=shlex.quote(base),
        ask=ask,
    )


def _is_finished(run: PlannedRun) -> bool:
    return state_of(run.folder, run.resolved).is_finished
