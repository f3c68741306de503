"""The benchmark as a plot: seconds of each step, and speed-ups beside those by executed FLOPs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raptr_ds.plots.pictures import COLOURS

_OURS = "raptr_ds"


def plot_benchmark(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Write a PNG of the benchmark's rows (report.rows_of), of one layout or several.

    Rows that ran out of memory, or have no full path to be compared with, are omitted; without any row there is no
    file.
    """
    rows = [row for row in rows if row["reached"] is not None]
    if not rows:
        return
    figure = Figure(figsize=(11, 4.2), dpi=90, layout="constrained")
    times, saving = figure.subplots(1, 2)
    _draw_seconds(times, [row for row in rows if row["layout"] == rows[0]["layout"]])
    _draw_saving(saving, [row for row in rows if row["name"] == _OURS])
    figure.savefig(file)


def _draw_seconds(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    labels = [f"{row['name']}, {row['path_length']:g} layers" for row in rows]
    colours = [COLOURS[0] if row["name"] == _OURS else COLOURS[1] for row in rows]
    bars = axes.barh(labels, [row["median_seconds"] for row in rows], color=colours)
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("seconds per step (median)")
    axes.set_title(rows[0]["layout"])


def _draw_saving(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    most = max(row["by_flops"] for row in rows)
    axes.plot([1, most], [1, most], color="#999999", linewidth=1, label="by executed FLOPs")
    for number, layout in enumerate(dict.fromkeys(row["layout"] for row in rows)):
        of_layout = [row for row in rows if row["layout"] == layout]
        by_flops = np.array([row["by_flops"] for row in of_layout])
        low, value, high = (by_flops * [row["reached"][name] for row in of_layout] for name in ("low", "value", "high"))
        colour = COLOURS[number % len(COLOURS)]
        axes.errorbar(
            by_flops, value, yerr=[value - low, high - value], fmt="o-", capsize=3, color=colour, label=layout
        )
    axes.set_xlabel("speed-up over the full path by executed FLOPs")
    axes.set_ylabel("measured (95% intervals)")
    axes.legend(frameon=False)
