"""The picture of depth tables: held-out loss by depth, by layers removed and by leaving early, for some models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from raptr_ds.depth.table import DepthTable
from raptr_ds.plots.pictures import COLOURS, literal
from raptr_ds.user_paths import write_error

_TEXT_POINTS = 12


def plot_depths(tables: Sequence[DepthTable], file: Path) -> None:
    """Write a PNG: a solid line for greedy removal and a dashed one for early exit of each model.

    The whole model's loss is a dotted level, by which its shallower ones are judged.
    Raises: PathError or StorageError if the disk does not take it.
    """
    figure = Figure(figsize=(9, 5.6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for index, table in enumerate(tables):
        name, colour = literal(table.label), COLOURS[index % len(COLOURS)]
        depths = [row.depth for row in table.rows]
        style = {"color": colour, "markersize": 6.5, "markeredgecolor": "white"}
        axes.plot(depths, [row.loss for row in table.rows], "o-", label=f"{name}, layers removed", **style)
        exits = [row.exit_loss for row in table.rows]
        axes.plot(depths, exits, "s--", linewidth=1.2, alpha=0.8, label=f"{name}, left early", **style)
        axes.axhline(table.rows[0].loss, color=colour, linestyle=":", linewidth=1.0, zorder=1)
    axes.set_title("held-out loss by depth; dotted: the whole model", fontsize=_TEXT_POINTS, loc="left")
    axes.set_xlabel("layers", fontsize=_TEXT_POINTS)
    axes.set_ylabel("loss, nats per predicted token", fontsize=_TEXT_POINTS)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=_TEXT_POINTS - 1.5)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=_TEXT_POINTS - 1, edgecolor="none", framealpha=0.9)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file)
    except OSError as error:
        raise write_error(file, error, "Name another file with --output.") from error
