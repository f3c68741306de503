"""A plot of speed-up by the number of pipeline stages, one panel for each path length."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")


def plot_scaling(
    stages: Sequence[int],
    speed_ups: Mapping[str, Mapping[str, Sequence[float]]],
    ideal: Mapping[str, float],
    file: Path,
) -> None:
    """Write a PNG. speed_ups: panel title -> sampling -> a value for each number of stages; ideal: by panel title."""
    figure = Figure(figsize=(4.6 * len(speed_ups), 4.0), dpi=90, layout="constrained")
    for index, (title, curves) in enumerate(speed_ups.items()):
        axes = figure.add_subplot(1, len(speed_ups), index + 1)
        axes.axhline(ideal[title], color="#555555", linewidth=1, linestyle="--", label="by FLOPs")
        for colour, (name, values) in zip(_COLOURS, curves.items(), strict=False):
            axes.plot(stages, values, color=colour, marker="o", markersize=4, label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(stages), [str(count) for count in stages])
        axes.set_ylim(bottom=0.95)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("pipeline stages")
        axes.spines[["top", "right"]].set_visible(False)
        if index == 0:
            axes.set_ylabel("speed-up over the full path")
            axes.legend(fontsize=9, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
