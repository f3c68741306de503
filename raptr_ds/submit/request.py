"""A submission: everything is checked first, then code and run files are copied, and the job goes to sbatch."""

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from raptr_ds.atomic_file import write_atomically
from raptr_ds.config.run import RunConfig
from raptr_ds.data.loader import folders_of
from raptr_ds.errors import ConfigError
from raptr_ds.submit.checks import (
    check_disk,
    check_folder,
    check_memory,
    complete_run_file,
    load_checked,
    measured_lead,
)
from raptr_ds.submit.container import ContainerWords, container_words
from raptr_ds.submit.layout import DEFAULT_LEAD_SECONDS, JobLayout, job_layout
from raptr_ds.submit.snapshot import copy_code, free_number
from raptr_ds.submit.sweep import sweep
from raptr_ds.supervise.record import append_event, run_folder
from raptr_ds.supervise.slurm_commands import sbatch
from raptr_ds.user_paths import make_folder, open_to_all, writing

WITHOUT_SBATCH = "Submit from a login node, or see the command by --dry-run."
_MAX_CHAIN = 1000


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
class Request:
    """What the user asks for: tools/submit.py's options by their names, and what it finds around them.

    more_options: of sbatch. home: the folder that relative paths count from. venv: the virtual environment that the
    job activates, empty without one. env: the environment that sbatch gets.
    """

    run_file: Path
    set: Sequence[str]
    nodes: str
    gpus_per_node: int | None
    tasks_per_node: int | None
    time: str | None
    signal_lead: int | None
    partition: str | None
    job_name: str | None
    device_memory: float | None
    chain: int
    array: Sequence[str]
    container: str | None
    container_runtime: str
    more_options: Sequence[str]
    home: Path
    venv: str
    env: Mapping[str, str]


@dataclass(frozen=True)
class CheckedRun:
    """One run of a request. text: its complete run file."""

    config: RunConfig
    folder: Path
    text: str


@dataclass(frozen=True)
class Submission:
    """A request without a mistake. folder: of the run, or of the sweep's runs. lines: what was found, for people."""

    request: Request
    folder: Path
    layout: JobLayout
    runs: Sequence[CheckedRun]
    container: ContainerWords
    lines: Sequence[str]

    def batch_file(self, code: Path, run_files: Sequence[Path]) -> str:
        """Return the batch file's text, in which names are quoted. code: the copy that the job runs."""
        return _BATCH_FILE.format(
            home=shlex.quote(str(self.request.home)),
            code=shlex.quote(str(code)),
            venv=shlex.quote(self.request.venv),
            lead=self.layout.lead_seconds,
            run_files=shlex.join(map(str, run_files)),
            step_options=shlex.join(self.container.step),
            task_words=shlex.join(self.container.task),
        )

    def command(self, batch_file: Path) -> list[str]:
        """Return sbatch's words, seen by no shell. Slurm replaces % in the output's name, and \\ in it (checks.py)."""
        request, folder = self.request, self.folder.absolute()
        output = "slurm-%A_%a.out" if request.array else "slurm-%j.out"
        words = ["sbatch", "--parsable", f"--job-name={request.job_name or folder.name}", *self.layout.words()]
        words += [f"--chdir={folder}", f"--output={output}", "--open-mode=append"]
        words += [f"--partition={request.partition}"] if request.partition else []
        words += [f"--array=0-{len(self.runs) - 1}"] if request.array else []
        words += ["--no-requeue", "--dependency=singleton"] if request.chain > 1 else ["--requeue"]
        return [*words, *request.more_options, str(batch_file.absolute())]

    def send(self) -> list[str]:
        """Copy the code and the run files, submit, and return what was done.

        Raises: ConfigError, PathError, StorageError.
        """
        request, folder = self.request, self.folder
        for place in (folder, *(run.folder for run in self.runs)):
            make_folder(place)
        number, code = free_number(folder), copy_code(folder.absolute())
        files = [run.folder.absolute() / f"submitted-{number}.json" for run in self.runs]
        batch = folder.absolute() / f"submitted-{number}.sbatch"
        texts = [self.batch_file(code, files), *(run.text for run in self.runs)]
        for path, text in zip([batch, *files], texts, strict=True):
            with writing(path, "Give your user permission to write it."):
                write_atomically(path, text)
        command = self.command(batch)
        lines = [f"code: {code}", f"batch file: {batch}", f"command: {shlex.join(command)}"]
        for count in range(request.chain):
            try:
                job = sbatch(command, WITHOUT_SBATCH, request.env)
            except ConfigError as error:
                if count:
                    raise ConfigError(
                        f"{error}\n{count} of {request.chain} jobs are submitted: see squeue --me"
                    ) from error
                raise
            lines.append(f"submitted job {job}")
            for index, run in enumerate(self.runs):
                name = f"{job}_{index}" if request.array else job
                problem = append_event(run.folder, "submit", job=name, command=command)
                lines += [problem] if problem else []
        watched = [str(run.folder) for run in self.runs] if len(self.runs) <= 8 else [str(self.runs[0].folder), "..."]
        return [
            *lines,
            f"output: {folder}/slurm-*.out",
            f"watch: python tools/status.py {shlex.join(watched)}",
            "stop: scancel --signal=USR1 --batch JOB saves and goes back to the queue; scancel JOB ends it",
        ]


def check(request: Request) -> Submission:
    """Check everything that can be known on the login node; nothing is written.

    Raises: ConfigError, DataError, CheckpointError, PathError.
    """
    if not 1 <= request.chain <= _MAX_CHAIN or (request.chain > 1 and request.array):
        raise ConfigError(
            f"--chain {request.chain}: a chain has 1 to {_MAX_CHAIN} jobs, and is none of arrays, whose runs would "
            "wait for each other. Submit a chain for each run."
        )
    folder = _folder_of(request.run_file, request.set)
    points = [[*request.set, *own] for own in (sweep(request.array, folder) if request.array else [[]])]
    lead = request.signal_lead
    if lead is None:
        leads = (measured_lead(_folder_of(request.run_file, settings)) for settings in points)
        lead = max(DEFAULT_LEAD_SECONDS, *(lead or 0 for lead in leads))
    layout = job_layout(request.nodes, request.gpus_per_node, request.tasks_per_node, request.time, lead)
    runs = []
    for settings in points:
        config = load_checked(request.run_file, settings, layout)
        text = complete_run_file(config, request.run_file, settings)
        runs.append(CheckedRun(config, Path(config.train.save), text))
    if request.chain > 1 and any(run.config.checkpoint.load == "none" for run in runs):
        raise ConfigError(
            f"--chain {request.chain} with raptr_ds.checkpoint.load=none: each job of the chain would start anew, and "
            "set the checkpoints of the one before aside. Leave load at auto, which continues from them, and give the "
            "run a folder of its own (raptr_ds.train.save)."
        )
    for run in runs:
        check_folder(run.folder, time.time(), may_wait=request.chain > 1)
    needs = [check_memory(run.config, layout, request.device_memory) for run in runs]
    sizes = " or ".join(map(str, layout.world_sizes))
    lines = [
        f"run: {len(runs)} x {request.run_file}, {sizes} processes, folder {folder}",
        *dict.fromkeys(needs),
        check_disk([run.config for run in runs], folder),
        f"signal to save: {layout.lead_seconds} s before the time limit",
        *(f"warning: {line}" for run in runs[:1] for line in run.config.warnings),
        *(f"warning: {problem}" for run in runs if (problem := open_to_all(run.folder))),
    ]
    return Submission(request, folder, layout, runs, _container_of(request, runs, folder), lines)


def _folder_of(run_file: Path, settings: Sequence[str]) -> Path:
    return run_folder(["--deepspeed_config", str(run_file), "--set", *settings]) or Path("runs")


def _container_of(request: Request, runs: list[CheckedRun], folder: Path) -> ContainerWords:
    if request.container is None:
        return ContainerWords()
    places = [folder, *(Path(place) for run in runs for place in folders_of(run.config.data.path))]
    places += [Path(run.config.data.tokenizer).parent for run in runs if run.config.data.tokenizer]
    places += [Path(run.config.eval.task_files) for run in runs if run.config.eval.task_files]
    loads = {run.config.checkpoint.load for run in runs} - {"auto", "none"}
    return container_words(
        request.container,
        request.container_runtime,
        [*places, *map(Path, sorted(loads))],
        has_gpus=request.gpus_per_node is not None,
        home=request.home,
        env=request.env,
    )
