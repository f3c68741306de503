"""A submission: everything is checked first, then code and run files are copied, and the job goes to sbatch."""

import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
from raptr_ds.submit.job import Submission, submit
from raptr_ds.submit.layout import DEFAULT_LEAD_SECONDS, job_layout
from raptr_ds.submit.snapshot import copy_code, free_number
from raptr_ds.submit.sweep import Point, run_settings, sweep
from raptr_ds.supervise.record import append_event, run_folder
from raptr_ds.user_paths import make_folder, open_to_all, write_error

_MAX_CHAIN = 1000


@dataclass(frozen=True)
class Request:
    """What the user asks for. settings: of --set. home: the folder that relative paths count from.

    env, venv: the environment that sbatch gets, and the virtual environment that the job activates, empty without one.
    """

    run_file: Path
    settings: tuple[str, ...]
    nodes: str
    gpus_per_node: int | None
    tasks_per_node: int | None
    time: str | None
    lead_seconds: int | None
    partition: str | None
    job_name: str | None
    device_gib: float | None
    chain: int
    array: tuple[str, ...]
    image: str | None
    runtime: str
    more_options: tuple[str, ...]
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
class Checked:
    """A request without a mistake. lines: what was found, for people."""

    submission: Submission
    runs: tuple[CheckedRun, ...]
    lines: tuple[str, ...]

    def send(self, env: Mapping[str, str]) -> list[str]:
        """Copy the code and the run files, submit, and return what was done.

        Raises: ConfigError, PathError, StorageError.
        """
        folder = self.submission.folder
        for place in (folder, *(run.folder for run in self.runs)):
            make_folder(place)
        number, code = free_number(folder), copy_code(folder.absolute())
        files = tuple(run.folder.absolute() / f"submitted-{number}.json" for run in self.runs)
        batch = folder.absolute() / f"submitted-{number}.sbatch"
        submission = replace(self.submission, code=code, run_files=files)
        texts = [
            (batch, submission.batch_file()),
            *((file, run.text) for file, run in zip(files, self.runs, strict=True)),
        ]
        for path, text in texts:
            try:
                write_atomically(path, text)
            except OSError as error:
                raise write_error(path, error, "Give your user permission to write it.") from error
        command = submission.command(batch)
        lines = [f"code: {code}", f"batch file: {batch}", f"command: {shlex.join(command)}"]
        for count in range(submission.chain):
            try:
                job = submit(command, env)
            except ConfigError as error:
                if count:
                    raise ConfigError(
                        f"{error}\n{count} of {submission.chain} jobs are submitted: see squeue --me"
                    ) from error
                raise
            lines.append(f"submitted job {job}")
            for index, run in enumerate(self.runs):
                name = f"{job}_{index}" if submission.is_array else job
                problem = append_event(run.folder, "submit", job=name, command=command)
                lines += [problem] if problem else []
        return [*lines, *_how_to_watch(self.runs, folder)]


def check(request: Request) -> Checked:
    """Check everything that can be known on the login node; nothing is written.

    Raises: ConfigError, DataError, CheckpointError, PathError.
    """
    if not 1 <= request.chain <= _MAX_CHAIN or (request.chain > 1 and request.array):
        raise ConfigError(
            f"--chain {request.chain}: a chain has 1 to {_MAX_CHAIN} jobs, and is none of arrays, whose runs would "
            "wait for each other. Submit a chain for each run."
        )
    points = sweep(request.array) if request.array else [Point((), "")]
    folder = run_folder(["--deepspeed_config", str(request.run_file), "--set", *request.settings]) or Path("runs")
    lead = request.lead_seconds
    if lead is None:
        lead = max(DEFAULT_LEAD_SECONDS, measured_lead(folder) or 0)
    layout = job_layout(request.nodes, request.gpus_per_node, request.tasks_per_node, request.time, lead)
    runs = []
    for point in points:
        settings = [*request.settings, *run_settings(point, folder)]
        config = load_checked(request.run_file, settings, layout)
        text = complete_run_file(config, request.run_file, settings)
        runs.append(CheckedRun(config, Path(str(config.train.save)), text))
    for run in runs:
        check_folder(run.folder, time.time(), may_wait=request.chain > 1)
    needs = [check_memory(run.config, layout, request.device_gib) for run in runs]
    sizes = " or ".join(map(str, layout.world_sizes))
    lines = [
        f"run: {len(runs)} x {request.run_file}, {sizes} processes, folder {folder}",
        *dict.fromkeys(needs),
        check_disk([run.config for run in runs], folder),
        f"signal to save: {layout.lead_seconds} s before the time limit",
        *(f"warning: {line}" for run in runs[:1] for line in run.config.warnings),
        *(f"warning: {problem}" for run in runs if (problem := open_to_all(run.folder))),
    ]
    submission = Submission(
        name=request.job_name or folder.absolute().name,
        folder=folder,
        layout=layout,
        home=request.home,
        code=folder.absolute() / "code-DIGEST",
        venv=request.venv,
        run_files=tuple(run.folder.absolute() / "submitted-N.json" for run in runs),
        is_array=bool(request.array),
        chain=request.chain,
        partition=request.partition,
        more_options=request.more_options,
        container=_container_of(request, runs, folder),
    )
    return Checked(submission, tuple(runs), tuple(lines))


def _container_of(request: Request, runs: list[CheckedRun], folder: Path) -> ContainerWords:
    if request.image is None:
        return ContainerWords()
    places = [folder, *(Path(place) for run in runs for place in folders_of(run.config.data.path))]
    places += [Path(run.config.data.tokenizer).parent for run in runs if run.config.data.tokenizer]
    loads = {run.config.checkpoint.load for run in runs} - {"auto", "none"}
    return container_words(
        request.image,
        request.runtime,
        [*places, *map(Path, sorted(loads))],
        has_gpus=request.gpus_per_node is not None,
        home=request.home,
        env=request.env,
    )


def _how_to_watch(runs: tuple[CheckedRun, ...], folder: Path) -> list[str]:
    watched = [str(run.folder) for run in runs] if len(runs) <= 8 else [str(runs[0].folder), "..."]
    return [
        f"output: {folder}/slurm-*.out",
        f"watch: python tools/status.py {shlex.join(watched)}",
        "stop: scancel --signal=USR1 --batch JOB saves and goes back to the queue; scancel JOB ends it",
    ]
