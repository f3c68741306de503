"""Running a comparison: the unfinished runs one after another, each by the documented command in its own folder."""

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import raptr_ds
from raptr_ds.errors import ConfigError, Exit
from raptr_ds.lab.plan import PlannedRun, Planner, Share, choose_rate
from raptr_ds.lab.status import LOG, add_start, last_log_lines, outcome_of, status_of
from raptr_ds.parallel.launch import environment_of_run, free_port
from raptr_ds.user_paths import take_lock

REPOSITORY = Path(raptr_ds.__file__).resolve().parents[1]
_STOP_SECONDS = 120.0  # for a run that is asked to stop: its step, and a checkpoint
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

_LIBC = ctypes.CDLL(None)  # loaded before any fork

Launcher = Callable[[PlannedRun], int]
"""Runs a planned run to its end and returns its exit code."""


@dataclass
class ComparisonProgress:
    """How far a comparison is.

    rates: each contestant's chosen one, None where there was none to choose; failed: a message for each failure.
    """

    shares: list[Share] = field(default_factory=list)
    tuning: list[PlannedRun] = field(default_factory=list)
    rates: dict[str, float | None] = field(default_factory=dict)
    comparison: list[PlannedRun] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def current_progress(planner: Planner, *, as_it_stands: bool = False) -> ComparisonProgress:
    """Return the plan and the rates chosen so far (see choose_rates). Raises: ConfigError as Planner.shares."""
    progress = ComparisonProgress(planner.shares())
    progress.tuning = planner.tuning_runs(progress.shares)
    progress.rates = choose_rates(progress.shares, progress.tuning, as_it_stands=as_it_stands)
    progress.comparison = _known(planner.comparison_runs(progress.shares, progress.rates))
    return progress


def choose_rates(
    shares: Sequence[Share], tuning: Sequence[PlannedRun], *, as_it_stands: bool = False
) -> dict[str, float | None]:
    """Return each contestant's rate; contestants whose tuning runs have not all ended, or all failed, have no entry.

    Failed runs are ignored. as_it_stands: ignore unfinished runs too. Without tuning runs every contestant has None.
    """
    rates: dict[str, float | None] = {}
    for name in (share.contestant.name for share in shares):
        losses: dict[float, float | None] = {}
        is_over = True
        for run in (run for run in tuning if run.contestant == name):
            status = status_of(run.folder, run.resolved)
            is_over &= as_it_stands or status.is_finished or outcome_of(run.folder).has_failed
            if run.learning_rate is not None:
                losses[run.learning_rate] = status.eval_loss if status.is_finished else None
        if not losses:
            rates[name] = None
        elif is_over and (rate := choose_rate(losses)) is not None:
            rates[name] = rate
    return rates


def run_comparison(
    planner: Planner, launch: Launcher, say: Callable[[str], None], record: Callable[[ComparisonProgress], None]
) -> ComparisonProgress:
    """Run what is not finished and return the result; a failed run does not keep the others from running.

    say: prints a line; record: saves the progress, called whenever there is more of it.
    Raises: ConfigError before anything runs if the file is wrong, or the folders hold runs of another description.
    """
    planner.check()
    failed: list[str] = []
    probes = planner.probes()
    refuse_other_runs(probes)
    _run_all("step time", probes, launch, say, failed)
    if failed:
        return ComparisonProgress(failed=failed)
    progress = ComparisonProgress(planner.shares(), failed=failed)
    progress.tuning = planner.tuning_runs(progress.shares)
    refuse_other_runs(progress.tuning)
    sweep = planner.experiment.sweep
    names = [share.contestant.name for share in progress.shares]
    for rate in (None,) if sweep is None else sweep.learning_rates:  # whichever is chosen
        refuse_other_runs(_known(planner.comparison_runs(progress.shares, dict.fromkeys(names, rate))))
    record(progress)
    _run_all("tuning", progress.tuning, launch, say, failed)
    progress.rates = choose_rates(progress.shares, progress.tuning)
    for name in names:
        if name not in progress.rates:
            failed.append(f"{name}: no learning rate can be chosen from its tuning runs, so its runs are skipped")
        elif progress.rates[name] is not None:
            say(f"{name}: learning rate {progress.rates[name]:g}")
    progress.comparison = _known(planner.comparison_runs(progress.shares, progress.rates))
    refuse_other_runs(progress.comparison)
    record(progress)
    _run_all("comparison", progress.comparison, launch, say, failed)
    record(progress)
    return progress


def _known(runs: Sequence[PlannedRun | None]) -> list[PlannedRun]:
    return [run for run in runs if run is not None]


def refuse_other_runs(runs: Sequence[PlannedRun]) -> None:
    """Raise ConfigError if the folder of one of the runs holds a run of another description."""
    for run in runs:
        differences = status_of(run.folder, run.resolved).differences
        if differences:
            shown = "; ".join(differences[:4]) + ("; ..." if len(differences) > 4 else "")
            raise ConfigError(
                f"{run.folder} holds another run than the comparison file describes: {shown}. Set another output, or "
                "remove that folder to run it again."
            )


def command_of(run: PlannedRun, base: str, processes: int, port: int | None = None) -> list[str]:
    """Return the documented command of a run; one process needs no launcher."""
    here = Path.cwd() == REPOSITORY
    script = ["raptr_ds/pretrain.py" if here else str(REPOSITORY / "raptr_ds" / "pretrain.py")]
    script += ["--deepspeed_config", base, "--set", *run.settings]
    if processes == 1:
        return ["python", *script]
    return ["deepspeed", "--num_accelerators", str(processes), *(["--master_port", str(port)] if port else []), *script]


@contextmanager
def claimed(folder: Path, say: Callable[[str], None]) -> Iterator[int]:
    """Lock a comparison's folder for this process; yields the lock's descriptor, which runs inherit.

    The last run of a tool that was killed may still be stopping: this waits for it.
    Raises: ConfigError if the folder stays locked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        for second in range(round(_STOP_SECONDS) + 1):
            if take_lock(file, folder):
                break
            if second == 0:
                say(f"{folder} is in use: waiting for it")
            time.sleep(1.0)
        else:
            raise ConfigError(f"{folder} is in use by another experiment.py. Wait for it, or set another output.")
        yield file.fileno()


@dataclass(frozen=True)
class LocalLauncher:
    """Runs a planned run on this machine; its output is appended to log.txt in its folder.

    lock: descriptor that the run keeps open, so that the folder stays locked until it ends.
    """

    base: str
    processes: int
    lock: int | None = None

    def __call__(self, run: PlannedRun) -> int:
        """Return the exit code. An interrupt first stops the run, with a checkpoint, and is then raised."""
        words = command_of(run, self.base, self.processes, free_port() if self.processes > 1 else None)
        beside = Path(sys.executable).parent / words[0]  # of this environment, whatever PATH is
        words[0] = str(beside) if beside.exists() else words[0]
        words[0] = sys.executable if self.processes == 1 else words[0]
        with (run.folder / LOG).open("ab") as log:
            log.write(f"\n{time.strftime('%F %T')} {shlex.join(words)}\n".encode())
            log.flush()
            # In its own session: Ctrl-C reaches this tool only, which passes it on once.
            process = subprocess.Popen(
                words,
                env=environment_of_run(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=() if self.lock is None else (self.lock,),
                preexec_fn=_stop_with_parent,  # noqa: PLW1509  (one system call, no lock taken)
            )
            try:
                return process.wait()
            except KeyboardInterrupt:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(_STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                raise


def _run_all(
    what: str, runs: Sequence[PlannedRun], launch: Launcher, say: Callable[[str], None], failed: list[str]
) -> None:
    for number, run in enumerate(runs, 1):
        before = status_of(run.folder, run.resolved)
        title = f"{what} {number}/{len(runs)}: {run.title}"
        if before.is_finished:
            say(f"{title}: finished before ({run.folder})")
            continue
        say(f"{title}: {run.steps} steps, {before.summary} ({run.folder})")
        run.folder.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        try:
            code = launch(run)
        except KeyboardInterrupt:
            add_start(run.folder, int(Exit.CONTINUE_LATER), time.perf_counter() - started)
            raise
        seconds = time.perf_counter() - started
        add_start(run.folder, code, seconds)
        after = status_of(run.folder, run.resolved)
        if code == Exit.DONE and after.is_finished:
            loss = "" if after.eval_loss is None else f", held-out loss {after.eval_loss:.4f}"
            say(f"{title}: done in {seconds:.0f} s{loss}")
            continue
        why = f"exit code {code}"
        if code == Exit.CONTINUE_LATER:
            why = "stopped by a signal; start again to continue it"
        tail = "".join(f"\n    {line}" for line in last_log_lines(run.folder))
        failed.append(
            f"{title}: FAILED at step {after.last_step} of {after.num_steps}, {why}; "
            f"the end of {run.folder / LOG}:{tail}"
        )
        say(failed[-1])


def _stop_with_parent() -> None:
    """In a run: let the kernel send SIGTERM when this tool dies (on Linux; elsewhere the run continues)."""
    if hasattr(_LIBC, "prctl"):
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def list_runs(planner: Planner) -> list[str]:
    """Return the plan as lines of Markdown, without running or writing anything. Raises: ConfigError, DataError."""
    planner.check()
    try:
        progress = current_progress(planner)
    except ConfigError as error:
        probes = planner.probes()
        if not probes:
            raise
        return [f"{error}", "", *_table(probes)]
    experiment, shares = planner.experiment, progress.shares
    runs = [*progress.tuning, *progress.comparison]
    lines = ["| contestant | paths | steps | FLOPs | of the first's |", "|---|---|---:|---:|---:|"]
    for share in shares:
        ratio = share.flops / shares[0].flops
        lines.append(f"| {share.contestant.name} | {share.path} | {share.steps:,} | {share.flops:.4g} | {ratio:.4f} |")
    lines += ["", *_table(runs)]
    flops = {share.contestant.name: share.flops for share in shares}
    waiting = {
        share.contestant.name: len(experiment.seeds_of(share.contestant))
        for share in shares
        if share.contestant.name not in progress.rates
    }
    if waiting:
        names, number = ", ".join(waiting), sum(waiting.values())
        lines += ["", f"and {number} runs of {names}, at the learning rates that tuning chooses"]
    unfinished = {run.folder: run for run in runs if not status_of(run.folder, run.resolved).is_finished}
    left = sum(flops[run.contestant] for run in unfinished.values())
    left += sum(flops[name] * number for name, number in waiting.items())
    lines += ["", f"FLOPs left to run: {left:.4g}"]
    if runs:
        command = shlex.join(command_of(runs[0], experiment.base, experiment.processes))
        lines += ["", "The first run by hand:", "", f"    {command}"]
    return lines


def _table(runs: Sequence[PlannedRun]) -> list[str]:
    lines = ["| run | purpose | steps | state | folder |", "|---|---|---:|---|---|"]
    for run in runs:
        status = status_of(run.folder, run.resolved)
        word = f"another run is there: {status.differences[0]}" if status.differences else status.summary
        lines.append(f"| {run.title} | {run.purpose} | {run.steps:,} | {word} | {run.folder} |")
    return lines
