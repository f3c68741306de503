"""Plots of runs: loss against steps and executed FLOPs, and which layers ran when."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from raptr_ds.plots.curves import Curves, smooth
from raptr_ds.plots.pictures import COLOURS, GREY, LINES, literal

_TEXT_POINTS = 12


def plot_runs(runs: Sequence[Curves], file: Path) -> None:
    """Write a PNG: both loss plots on top, one path heat map for each run below, then the scores on tasks, if any.

    Full-model evaluations are drawn as points, training losses as lines (if they are many: pale, with their moving
    mean). Vertical lines mark where phases begin, with their path length if there is one run.
    """
    metrics = list(dict.fromkeys(curve.metric for run in runs for curve in run.tasks))
    rows = -(-len(metrics) // 2)  # of scores
    figure = Figure(figsize=(14, 5.6 + 3.0 * len(runs) + 4.0 * rows), dpi=120, layout="constrained")
    grid = figure.add_gridspec(1 + len(runs) + rows, 2, height_ratios=[5.0, *[2.4] * len(runs), *[3.6] * rows])
    by_step = figure.add_subplot(grid[0, 0])
    by_flops = figure.add_subplot(grid[0, 1], sharey=by_step)
    for index, run in enumerate(runs):
        colour = COLOURS[index % len(COLOURS)]
        for axes, by in ((by_step, run.step), (by_flops, run.flops)):
            draw_loss(axes, run, np.asarray(by, dtype=float), colour)
            draw_phases(axes, run, axes is by_flops, colour, labelled=len(runs) == 1)
        draw_paths(figure.add_subplot(grid[1 + index, :]), run, colour)
    for index, metric in enumerate(metrics):
        is_alone = index == len(metrics) - 1 and index % 2 == 0
        place = grid[1 + len(runs) + index // 2, slice(None) if is_alone else index % 2]
        draw_tasks(figure.add_subplot(place), runs, metric)
    note = ""
    if any(len(run.phase_starts()) > 1 for run in runs):
        note = "; dotted: a phase begins" + (", with its path length" if len(runs) == 1 else "")
    for axes, by in ((by_step, "step"), (by_flops, "executed FLOPs")):
        axes.set_title(f"loss by {by}{note}", fontsize=_TEXT_POINTS, loc="left")
        finish(axes, by, _TEXT_POINTS)
    by_step.set_ylabel("loss", fontsize=_TEXT_POINTS)
    by_flops.tick_params(labelleft=False)
    by_step.legend(fontsize=_TEXT_POINTS - 1, loc="upper right", edgecolor="none", framealpha=0.9)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def draw_loss(axes: Axes, run: Curves, by: np.ndarray, colour: str) -> None:
    """Draw a run's training loss and full-model evaluations. by: x of each training line, (n,)."""
    name = literal(run.name)
    if run.step.size > 100:
        axes.plot(by, run.loss, color=colour, alpha=0.22, linewidth=0.8)
        axes.plot(by, smooth(run.loss, run.step.size // 50), color=colour, linewidth=1.8, label=f"{name}, training")
    else:
        axes.plot(by, run.loss, color=colour, linewidth=1.6, label=f"{name}, training")
    steps, losses = run.full_model_evaluations()
    if steps.size:
        places = np.interp(steps, run.step, by)
        style = {"marker": "o", "markersize": 6.5, "markeredgecolor": "white", "linestyle": "--", "linewidth": 1.0}
        axes.plot(places, losses, color=colour, label=f"{name}, full model, held out", zorder=4, **style)


def draw_phases(axes: Axes, run: Curves, by_flops: bool, colour: str, *, labelled: bool) -> None:
    """Mark where each phase begins."""
    starts = run.phase_starts()
    if len(starts) < 2:
        return
    for step, path_length in starts:
        place = float(run.flops_at(np.array([step - 1]))[0]) if by_flops else step
        if step != starts[0][0]:
            axes.axvline(place, color=GREY if labelled else colour, linestyle=":", linewidth=1.1, zorder=1)
        if labelled:
            text, at = f" {path_length:.3g}", axes.get_xaxis_transform()
            axes.text(place, 0.012, text, transform=at, fontsize=_TEXT_POINTS - 1.5, color=GREY, va="bottom")


def draw_paths(axes: Axes, run: Curves, colour: str) -> None:
    """Draw which layers were active at which steps: coloured where active, paler where not always or in part."""
    activity, edges = run.activity()
    colours = LinearSegmentedColormap.from_list("activity", ["#f4f4f4", colour])
    layers = np.arange(run.num_layers + 1) - 0.5
    axes.pcolormesh(edges, layers, activity, cmap=colours, vmin=0, vmax=1, rasterized=True)
    if run.num_layers <= 48:
        axes.hlines(layers[1:-1], edges[0], edges[-1], color="white", linewidth=0.8)
    stride = max(1, -(-run.num_layers // 12))
    axes.set_yticks(range(0, run.num_layers, stride))
    axes.set_ylabel("layer", fontsize=_TEXT_POINTS)
    axes.set_xlabel("step", fontsize=_TEXT_POINTS)
    title = f"{literal(run.name)}: active layers ({run.ran_in_words})"
    axes.set_title(title, fontsize=_TEXT_POINTS, loc="left")
    axes.tick_params(labelsize=_TEXT_POINTS - 1.5)
    for step, _ in run.phase_starts()[1:]:
        axes.axvline(step - 0.5, color="black", linestyle=":", linewidth=1.1)
    axes.spines[:].set_visible(False)


def draw_tasks(axes: Axes, runs: Sequence[Curves], metric: str) -> None:
    """Draw the scores of all tasks by one metric, with standard errors: a colour for each task, a line for each run."""
    tasks = list(dict.fromkeys(curve.task for run in runs for curve in run.tasks if curve.metric == metric))
    for run, line in zip(runs, cycle(LINES)):
        for curve in (curve for curve in run.tasks if curve.metric == metric):
            colour = COLOURS[tasks.index(curve.task) % len(COLOURS)]
            label = curve.task if len(runs) == 1 else f"{curve.task}, {literal(run.name)}"
            style = {"marker": "o", "markersize": 4.5, "linewidth": 1.4, "elinewidth": 0.9, "capsize": 2}
            axes.errorbar(curve.step, curve.score, curve.errors, color=colour, linestyle=line, label=label, **style)
    axes.set_title(f"tasks: {metric}, with standard errors where there are any", fontsize=_TEXT_POINTS, loc="left")
    finish(axes, "step", _TEXT_POINTS)
    axes.legend(fontsize=_TEXT_POINTS - 1.5, edgecolor="none", framealpha=0.9)


def finish(axes: Axes, label: str, points: float, *, from_zero: bool = True) -> None:
    """Label the x axis, and draw a grid instead of a frame. points: of the text."""
    axes.set_xlabel(label, fontsize=points)
    axes.tick_params(labelsize=points - 1.5)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if from_zero:
        axes.set_xlim(left=0)
