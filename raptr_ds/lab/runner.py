"""Running a comparison: what is not finished, one run after another, by the documented command, each in its folder."""

import ctypes
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import raptr_ds
from raptr_ds.errors import ConfigError, Exit
from raptr_ds.lab.plan import PlannedRun, Planner, Share, choose_rate
from raptr_ds.lab.state import RunState, state_of
from raptr_ds.parallel.launch import free_port

LOG, OUTCOME = "log.txt", "outcome.json"
REPOSITORY = Path(raptr_ds.__file__).resolve().parents[1]
_LOG_LINES = 15
_STOP_SECONDS = 120.0  # for a run that is asked to stop: its step, and a checkpoint
_NO_END = {None, int(Exit.DONE), int(Exit.CONTINUE_LATER)}  # exit codes of runs that are not finished, and can be
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

_LIBC = ctypes.CDLL(None)  # loaded before any fork

Launch = Callable[[PlannedRun], int]
"""Runs a planned run to its end and returns its exit code."""


@dataclass
class Progress:
    """What a comparison has come to. rates: the chosen one of each contestant, None where none had to be chosen."""

    shares: list[Share] = field(default_factory=list)
    tuning: list[PlannedRun] = field(default_factory=list)
    rates: dict[str, float | None] = field(default_factory=dict)
    comparison: list[PlannedRun] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def current_progress(planner: Planner, *, as_it_stands: bool = False) -> Progress:
    """Return what is planned, and the rates chosen (see choose_rates). Raises: ConfigError as Planner.shares."""
    progress = Progress(planner.shares())
    progress.tuning = planner.tuning_runs(progress.shares)
    progress.rates = choose_rates(progress.shares, progress.tuning, as_it_stands=as_it_stands)
    progress.comparison = comparison_runs(planner, progress)
    return progress


def choose_rates(
    shares: Sequence[Share], tuning: Sequence[PlannedRun], *, as_it_stands: bool = False
) -> dict[str, float | None]:
    """Return each contestant's rate; contestants whose tuning runs are not all over, or all failed, have no entry.

    A run that failed is passed over: its outcome says so. as_it_stands: take unfinished runs as failed. Without tuning
    runs every contestant has None.
    """
    rates: dict[str, float | None] = {}
    for name in (share.contestant.name for share in shares):
        losses: dict[float, float | None] = {}
        is_over = True
        for run in (run for run in tuning if run.contestant == name):
            state = state_of(run.folder, run.resolved)
            is_over &= as_it_stands or state.is_finished or exit_code_of(run.folder) not in _NO_END
            if run.learning_rate is not None:
                losses[run.learning_rate] = state.eval_loss if state.is_finished else None
        if not losses:
            rates[name] = None
        elif is_over and (rate := choose_rate(losses)) is not None:
            rates[name] = rate
    return rates


def comparison_runs(planner: Planner, progress: Progress) -> list[PlannedRun]:
    """Return the compared runs of the contestants that have their rate, seed by seed: pairs become complete early."""
    return [
        planner.comparison_run(share, seed, progress.rates[share.contestant.name])
        for seed in planner.experiment.seeds
        for share in progress.shares
        if share.contestant.name in progress.rates
    ]


def run_comparison(
    planner: Planner, launch: Launch, say: Callable[[str], None], record: Callable[[Progress], None]
) -> Progress:
    """Run all that is not finished and return what became of it; a run that fails does not keep others from running.

    record is called whenever more is known. Raises: ConfigError before anything runs if the file is wrong, or if runs
    of another description stand in the folders.
    """
    planner.check()
    failed: list[str] = []
    probes = planner.probes()
    refuse_other_runs(probes)
    _run_all("step time", probes, launch, say, failed)
    if failed:
        return Progress(failed=failed)
    progress = Progress(planner.shares(), failed=failed)
    progress.tuning = planner.tuning_runs(progress.shares)
    refuse_other_runs([*progress.tuning, *_any_rate(planner, progress.shares)])
    record(progress)
    _run_all("tuning", progress.tuning, launch, say, failed)
    progress.rates = choose_rates(progress.shares, progress.tuning)
    for share in progress.shares:
        name = share.contestant.name
        if name not in progress.rates:
            failed.append(f"{name}: no learning rate can be chosen from its tuning runs, so its runs are left out")
        elif progress.rates[name] is not None:
            say(f"{name}: learning rate {progress.rates[name]:g}")
    progress.comparison = comparison_runs(planner, progress)
    refuse_other_runs(progress.comparison)
    record(progress)
    _run_all("comparison", progress.comparison, launch, say, failed)
    record(progress)
    return progress


def refuse_other_runs(runs: Sequence[PlannedRun]) -> None:
    """Raise ConfigError if the folder of one of the runs holds a run of another description."""
    for run in runs:
        state = state_of(run.folder, run.resolved)
        if state.differing:
            shown = "; ".join(state.differing[:4]) + ("; ..." if len(state.differing) > 4 else "")
            raise ConfigError(
                f"{run.folder} holds another run than the comparison file describes: {shown}. Give another output, or "
                "remove that folder to run it anew."
            )


def exit_code_of(folder: Path) -> int | None:
    """Return the exit code of the last start of a run here, None if it has none on record."""
    file = folder / OUTCOME
    return json.loads(file.read_text(encoding="utf-8"))["exit_code"] if file.exists() else None


def last_lines(log: Path, count: int = _LOG_LINES) -> list[str]:
    """Return the last lines of a log, empty ones left out."""
    if not log.exists():
        return []
    lines = [line.rstrip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return [line for line in lines if line][-count:]


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
    """Hold a comparison's folder for this process alone; gives the descriptor of the lock, which runs inherit.

    Where this tool was killed its last run may still be stopping: that is waited for. Raises: ConfigError if the folder
    stays taken.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        for second in range(round(_STOP_SECONDS) + 1):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if second == 0:
                    say(f"{folder} is in use: waiting for it")
                time.sleep(1.0)
        else:
            raise ConfigError(f"{folder} is in use by another experiment.py. Wait for it, or give another output.")
        yield lock.fileno()


@dataclass(frozen=True)
class LocalLaunch:
    """Runs a planned run on this machine; its output is appended to log.txt in its folder.

    lock: descriptor that the run keeps open, so that the folder is taken while it lives.
    """

    base: str
    processes: int
    lock: int | None = None

    def __call__(self, run: PlannedRun) -> int:
        """Return the exit code. On an interrupt the run is asked to stop, with a checkpoint, before it goes on."""
        words = command_of(run, self.base, self.processes, free_port() if self.processes > 1 else None)
        beside = Path(sys.executable).parent / words[0]  # of this environment, whatever PATH says
        words[0] = str(beside) if beside.exists() else words[0]
        words[0] = sys.executable if self.processes == 1 else words[0]
        with (run.folder / LOG).open("ab") as log:
            log.write(f"\n{time.strftime('%F %T')} {shlex.join(words)}\n".encode())
            log.flush()
            # A session of its own: Ctrl-C is for this tool, which passes it on once.
            process = subprocess.Popen(
                words,
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
    what: str, runs: Sequence[PlannedRun], launch: Launch, say: Callable[[str], None], failed: list[str]
) -> None:
    for number, run in enumerate(runs, 1):
        before = state_of(run.folder, run.resolved)
        title = f"{what} {number}/{len(runs)}: {run.title}"
        if before.is_finished:
            say(f"{title}: finished before ({run.folder})")
            continue
        say(f"{title}: {run.steps} steps, {before.word} ({run.folder})")
        run.folder.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        try:
            code = launch(run)
        except KeyboardInterrupt:
            _write_outcome(run.folder, int(Exit.CONTINUE_LATER), time.perf_counter() - started)
            raise
        seconds = time.perf_counter() - started
        _write_outcome(run.folder, code, seconds)
        after = state_of(run.folder, run.resolved)
        if code == Exit.DONE and after.is_finished:
            loss = "" if after.eval_loss is None else f", held-out loss {after.eval_loss:.4f}"
            say(f"{title}: done in {seconds:.0f} s{loss}")
        else:
            failed.append(_failure(title, code, after, run.folder))
            say(failed[-1])


def _failure(title: str, code: int, state: RunState, folder: Path) -> str:
    why = "stopped by a signal; start again to continue it" if code == Exit.CONTINUE_LATER else f"exit code {code}"
    tail = "\n".join(f"    {line}" for line in last_lines(folder / LOG))
    return f"{title}: FAILED at step {state.last_step} of {state.num_steps}, {why}; the end of {folder / LOG}:\n{tail}"


def _write_outcome(folder: Path, code: int, seconds: float) -> None:
    file = folder / OUTCOME
    before: Mapping[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    outcome = {
        "exit_code": code,
        "wall_seconds": before.get("wall_seconds", 0.0) + seconds,
        "starts": before.get("starts", 0) + 1,
    }
    file.write_text(json.dumps(outcome) + "\n", encoding="utf-8")


def _any_rate(planner: Planner, shares: Sequence[Share]) -> list[PlannedRun]:
    """Return the compared runs by every rate that may be chosen, to check them beforehand."""
    sweep = planner.experiment.sweep
    rates = (None,) if sweep is None else sweep.learning_rates
    return [
        planner.comparison_run(share, seed, rate)
        for share in shares
        for seed in planner.experiment.seeds
        for rate in rates
    ]


def _stop_with_parent() -> None:
    """In a run: have the kernel send SIGTERM when this tool dies, of whatever (on Linux; elsewhere the run goes on)."""
    if hasattr(_LIBC, "prctl"):
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def list_runs(planner: Planner) -> list[str]:
    """Return the lines; nothing is run or written. Raises: ConfigError, DataError."""
    planner.check()
    experiment = planner.experiment
    try:
        progress = current_progress(planner)
    except ConfigError as error:
        probes = planner.probes()
        if not probes:
            raise
        return [f"{error}", "", *_table(probes)]
    first = progress.shares[0]
    lines = ["| contestant | paths | steps | FLOPs | of the first's |", "|---|---|---:|---:|---:|"]
    for share in progress.shares:
        ratio = share.flops / first.flops
        lines.append(f"| {share.contestant.name} | {share.path} | {share.steps:,} | {share.flops:.4g} | {ratio:.4f} |")
    lines += ["", *_table([*progress.tuning, *progress.comparison])]
    open_names = [share.contestant.name for share in progress.shares if share.contestant.name not in progress.rates]
    if open_names:
        waiting = len(open_names) * len(experiment.seeds)
        lines += ["", f"and {waiting} runs of {', '.join(open_names)}, at the learning rates that tuning chooses"]
    flops = {share.contestant.name: share.flops for share in progress.shares}
    runs = {run.folder: run for run in (*progress.tuning, *progress.comparison)}.values()
    left = sum(flops[run.contestant] for run in runs if not state_of(run.folder, run.resolved).is_finished)
    left += sum(flops[name] for name in open_names) * len(experiment.seeds)
    lines += ["", f"FLOPs left to run: {left:.4g}"]
    if progress.comparison or progress.tuning:
        example = (*progress.tuning, *progress.comparison)[0]
        command = shlex.join(command_of(example, experiment.base, experiment.processes))
        lines += ["", "The first run by hand:", "", f"    {command}"]
    return lines


def _table(runs: list[PlannedRun]) -> list[str]:
    lines = ["| run | purpose | steps | state | folder |", "|---|---|---:|---|---|"]
    for run in runs:
        state = state_of(run.folder, run.resolved)
        word = f"another run is there: {state.differing[0]}" if state.differing else state.word
        lines.append(f"| {run.title} | {run.purpose} | {run.steps:,} | {word} | {run.folder} |")
    return lines
