"""The results of fine-tuning as a table."""

from collections.abc import Sequence
from statistics import fmean

from rich.table import Table

from raptr_ds.finetuning.metrics import SCORE
from raptr_ds.finetuning.seeds import TaskResult


def results_table(results: Sequence[TaskResult]) -> Table:
    """Return a row for each task: mean and standard deviation over its seeds, times 100 as GLUE has them."""
    table = Table(title="validation, times 100: mean ± standard deviation over seeds")
    table.add_column("task")
    for name in ("score", "baseline", "seeds"):
        table.add_column(name, justify="right")
    table.add_column("metrics", overflow="fold")
    for result in results:
        names = [name for name in result.mean if name.rpartition("/")[2] in result.metrics]
        metrics = ", ".join(f"{name} {_spread(result, name)}" for name in names)
        best = "" if len(result.seeds) == 1 else f" (best: {result.best})"
        baseline = "" if result.baseline is None else f"{100 * result.baseline:.1f}"
        table.add_row(result.task, _spread(result, SCORE), baseline, f"{len(result.seeds)}{best}", metrics)
    if len(results) > 1:
        table.add_section()
        table.add_row("mean", f"{100 * fmean(result.mean[SCORE] for result in results):.2f}", "", "", "")
    return table


def _spread(result: TaskResult, name: str) -> str:
    deviation = result.deviation[name]
    return f"{100 * result.mean[name]:.2f}" + ("" if deviation is None else f" ± {100 * deviation:.2f}")
