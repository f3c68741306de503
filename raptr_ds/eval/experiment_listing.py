"""What a comparison would run, as Markdown: steps and FLOPs of each contestant, and the state of each run."""

import shlex

from raptr_ds.errors import ConfigError
from raptr_ds.eval.experiment_plan import PlannedRun, Planner
from raptr_ds.eval.experiment_runner import command_of, current_progress
from raptr_ds.eval.experiment_state import state_of


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
