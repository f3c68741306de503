"""A comparison as Slurm job arrays: one job a run, first tuning, then the compared runs, then the report.

The batch files are like slurm/bert_raptr.sbatch, except that a job asks tools/experiment.py for the settings of its
number in the array when it starts, since only then the tuned rates are known. slurm/training_job.sh does the rest:
srun, stops, requeueing.
"""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from raptr_ds.errors import ConfigError
from raptr_ds.lab.plan import PlannedRun, Planner
from raptr_ds.lab.runner import REPOSITORY, ComparisonProgress, current_progress, refuse_other_runs
from raptr_ds.lab.status import status_of
from raptr_ds.supervise.slurm_commands import sbatch

_FOLDER = "slurm"

_TRAINING = """\
#!/bin/bash
# {what}, made by tools/experiment.py --slurm. Job N of the array is run N of the comparison.
#SBATCH --job-name="{name}"
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={tasks}
#SBATCH --array={array}
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output="{output}/%x-%a.out"
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
#SBATCH --job-name="{name}"
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --output="{output}/%x-%j.out"
cd {home} && {ask} --report
"""


def write_jobs(planner: Planner, file: Path, overrides: Sequence[str]) -> tuple[ComparisonProgress, list[Path]]:
    """Write batch files for the unfinished runs into the comparison's folder; return them, and how far it is.

    Each job is to start after the one before has ended. While step times are still to be measured, only those runs are
    written: call this again afterwards.
    Raises: ConfigError outside the repository, which the jobs' paths are relative to, or if other runs are in the
    folders.
    """
    if Path.cwd().resolve() != REPOSITORY:
        raise ConfigError(f"--slurm works from the repository, which its jobs' paths are relative to: cd {REPOSITORY}")
    planner.check()
    _check_names([str(planner.output.resolve()), file.stem, *planner.experiment.slurm.options])
    runs = array_runs(planner)
    refuse_other_runs([run for run in runs if run is not None])
    wanted: dict[str, list[int]] = {"probe": [], "tuning": [], "comparison": []}
    for number, run in enumerate(runs):
        if run is None or not _is_finished(run):
            wanted["comparison" if run is None else run.purpose].append(number)
    is_measured = not wanted["probe"]
    progress = current_progress(planner) if is_measured else ComparisonProgress()
    folder = planner.output.resolve() / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "tools/experiment.py", str(file.resolve()), *(["--set", *overrides] if overrides else [])]
    ask = shlex.join(words)
    texts = {what: _training_file(planner, what, numbers, folder, ask) for what, numbers in wanted.items() if numbers}
    if is_measured:
        home = shlex.quote(str(REPOSITORY))
        texts["report"] = _REPORT.format(name=f"{file.stem}-report", output=folder, home=home, ask=ask)
    files = [folder / f"{name}.sbatch" for name in texts]
    for path, text in zip(files, texts.values(), strict=True):
        path.write_text(text, encoding="utf-8")
    return progress, files


def array_runs(planner: Planner, *, as_it_stands: bool = False) -> list[PlannedRun | None]:
    """Return all runs by their number in the arrays, which never changes; None where the rate is not chosen yet.

    as_it_stands: choose it from the finished tuning runs, ignoring the others.
    """
    probes = planner.probes()
    if not all(map(_is_finished, probes)):
        return [*probes]
    progress = current_progress(planner, as_it_stands=as_it_stands)
    return [*probes, *progress.tuning, *planner.comparison_runs(progress.shares, progress.rates)]


def settings_of(planner: Planner, number: int) -> list[str]:
    """Return the settings of a run by its number in the array. Raises: ConfigError if its rate cannot be chosen."""
    # A compared run's job starts after all tuning jobs have ended, so unfinished tuning runs have failed.
    runs = array_runs(planner, as_it_stands=True)
    run = runs[number] if number < len(runs) else None
    if run is None:
        raise ConfigError(
            f"run {number} has no learning rate: no tuning run of its contestant is finished. See their output in "
            f"{planner.output / _FOLDER} and submit them again."
        )
    return list(run.settings)


def submit(files: Sequence[Path], env: Mapping[str, str], only_write: bool = False) -> list[str]:
    """Submit the batch files by sbatch, each to start after the one before; return what was done, in words.

    env: this process's own. Raises: ConfigError if sbatch refuses.
    """
    if only_write:
        return [f"wrote {file}" for file in files]
    lines, before = [], None
    for file in files:
        command = ["sbatch", "--parsable", *([f"--dependency=afterany:{before}"] if before else []), str(file)]
        before = sbatch(command, "--write-only writes the batch files without submitting them.", env)
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


def _check_names(names: Sequence[str]) -> None:
    """Raises: ConfigError for what no quotes keep in its #SBATCH line."""
    for name in names:
        if unfit := [character for character in name if character in '%"\\' or not character.isprintable()]:
            raise ConfigError(
                f"{name!r} holds {unfit[0]!r}, which a line of a batch file cannot hold. Give the file, its output or "
                "slurm.options other names."
            )


def _is_finished(run: PlannedRun) -> bool:
    return status_of(run.folder, run.resolved).is_finished
