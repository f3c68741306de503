"""What an evaluation found: a table for the terminal, and everything as JSON."""

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from raptr_ds.evaluation.gold_bits import METRIC
from raptr_ds.evaluation.run import Outcome, Score


def as_json(
    model: str, outcomes: Sequence[Outcome], settings: dict[str, Any], shots: Sequence[int] = ()
) -> dict[str, Any]:
    """Return {"model", "results": {task: {"shots", metric, metric_stderr, ...}}, "tasks", "settings"}.

    With several numbers of examples the tasks are called TASK@SHOTS. Metrics scored left to right end in _causal.
    shots: numbers that were asked for, of which the outcomes may not have all.
    """
    several = len({*shots, *(outcome.shots for outcome in outcomes)}) > 1
    results, tasks = {}, {}
    for outcome in outcomes:
        name = f"{outcome.task}@{outcome.shots}" if several else outcome.task
        results[name] = {"shots": outcome.shots}
        for metric, scores in outcome.scores.items():
            for scoring, score in scores.items():
                key = metric if scoring == "prefix" else f"{metric}_{scoring}"
                results[name] |= {key: score.value, f"{key}_stderr": score.stderr}
        tasks[name] = {
            "documents": outcome.documents,
            "of": outcome.of,
            "version": outcome.version,
            "examples_from": outcome.examples_from,
            "truncated": outcome.truncated,
            "higher_is_better": outcome.higher_is_better,
        }
    return {"model": model, "results": results, "tasks": tasks, "settings": settings}


def as_table(title: str, outcomes: Sequence[Outcome], scorings: Sequence[str]) -> Table:
    """Return one table: a line for each task, number of examples and metric; a column for each scoring."""
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
    for name in ("task", "shots", "docs", "metric"):
        table.add_column(name, justify="right" if name in ("shots", "docs") else "left", no_wrap=name != "task")
    for scoring in scorings:
        table.add_column(scoring, justify="right", no_wrap=True)
    for outcome in outcomes:
        start = [outcome.task, str(outcome.shots), f"{outcome.documents:,}"]
        in_order = sorted(outcome.scores.items(), key=lambda scored: scored[0] == METRIC)
        for number, (metric, scores) in enumerate(in_order):
            better = outcome.higher_is_better.get(metric.partition(",")[0])
            arrow = "" if better is None else " ↑" if better else " ↓"
            cells = [_cell(scores.get(scoring)) for scoring in scorings]
            table.add_row(*(start if number == 0 else ["", "", ""]), metric + arrow, *cells)
    return table


def notes(outcomes: Sequence[Outcome], longest: int) -> list[str]:
    """Return what to print below the table: contexts that were cut, and examples from the evaluated documents."""
    lines = [
        f"{outcome.task}, {outcome.shots} shots: {outcome.truncated:,} of {outcome.documents:,} contexts are too long "
        f"for the model's {longest:,} tokens; they lost their beginning"
        for outcome in outcomes
        if outcome.truncated
    ]
    words = {
        "others": "are other documents of its {} split, which is the evaluated one",
        "any": "are documents of its {} split, which is the evaluated one: the asked one may be among them",
    }
    examples = [
        f"{outcome.task}: examples {words[outcome.examples_are].format(outcome.examples_from)}"
        for outcome in outcomes
        if outcome.examples_are is not None
    ]
    return lines + list(dict.fromkeys(examples))


def _cell(score: Score | None) -> str:
    if score is None:
        return ""
    return f"{score.value:.4f}" + (f" ± {score.stderr:.4f}" if score.stderr is not None else "")
