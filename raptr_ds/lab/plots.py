"""Pictures of comparisons, each as the bytes of a PNG: losses, the full model by phase, paths, learning rates, and how
differences depend on the length of training.
"""

import io
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raptr_ds.lab.comparison import Comparison, RunResult, mean_curve
from raptr_ds.lab.trend import TrendPoint
from raptr_ds.plots.curves import Curves, smooth
from raptr_ds.plots.pictures import Look, looks_of
from raptr_ds.plots.runs import draw_paths, finish

_TEXT_POINTS = 11
_DPI = 110
_AXES = (("step", "step"), ("flops", "executed FLOPs"), ("seconds", "seconds in steps"))
_MOST_MARKED = 30  # points of a curve that are marked one by one
_BESIDE = 0.1  # of the tokens at a point, at most, by which points of different names are apart
_UNSETTLED = 0.3  # of the points: showing the first steep fall would hide the differences between contestants


def loss_picture(comparison: Comparison) -> bytes | None:
    """Draw losses by steps, executed FLOPs and time: means over the seeds, shaded from the lowest to the highest.

    Top: held-out losses of the full model. Bottom: training losses, along each step's path. None without runs.
    """
    if not _begun(comparison):
        return None
    figure = Figure(figsize=(15, 9), dpi=_DPI, layout="constrained")
    rows = figure.subplots(2, 3, sharey="row")
    for row, evaluated in zip(rows, (True, False), strict=True):
        settled = []
        for axes, (by, label) in zip(row, _AXES, strict=True):
            for name, look in looks_of(comparison.contestants).items():
                settled.append(_draw_mean(axes, comparison.of(name), by, evaluated, look, name))
            finish(axes, label, _TEXT_POINTS)
        what = "full model, held out" if evaluated else "training, along each step's path"
        row[0].set_ylabel(f"loss ({what})", fontsize=_TEXT_POINTS)
        _focus(row[0], settled)
    handles, labels = rows[1][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(6, len(labels)), frameon=False, fontsize=12)
    return _png(figure)


def phases_picture(comparison: Comparison) -> bytes | None:
    """Draw the full model's held-out loss through the phases of each contestant, over its paths' training loss.

    One panel each, all seeds; dotted lines show where phases begin, with their mean path length. None without runs.
    """
    shown = _begun(comparison)
    if not shown:
        return None
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(5 * columns, 3.7 * rows), dpi=_DPI, layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    looks = looks_of(comparison.contestants)
    settled = []
    for axes, (name, seeds) in zip(panels, shown.items(), strict=False):
        for curves in seeds:
            settled += _draw_through_phases(axes, curves, looks[name].colour, labelled=curves is seeds[0])
        axes.set_title(name, fontsize=_TEXT_POINTS + 1, loc="left")
        finish(axes, "step", _TEXT_POINTS)
    _focus(panels[0], settled)
    for axes in panels[::columns]:
        axes.set_ylabel("loss", fontsize=_TEXT_POINTS)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=_TEXT_POINTS)
    return _png(figure)


def paths_picture(comparison: Comparison) -> bytes | None:
    """Draw which layers ran at which steps, for the first seed of each contestant that has run. None without runs."""
    firsts = [(name, seeds[0]) for name, seeds in _begun(comparison).items()]
    if not firsts:
        return None
    figure = Figure(figsize=(15, 2.5 * len(firsts)), dpi=_DPI, layout="constrained")
    panels = figure.subplots(len(firsts), 1, squeeze=False).ravel()
    looks = looks_of(comparison.contestants)
    for axes, (name, curves) in zip(panels, firsts, strict=True):
        draw_paths(axes, curves, looks[name].colour)
        axes.set_title(f"{name}: {curves.ran_in_words}", fontsize=_TEXT_POINTS + 1, loc="left")
    return _png(figure)


def rates_picture(comparison: Comparison) -> bytes | None:
    """Draw the held-out loss at each learning rate; the chosen ones are ringed. None without a sweep."""
    if not any(run.is_finished for run in comparison.tuning):
        return None
    figure = Figure(figsize=(7.5, 4.4), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    for name, look in looks_of(comparison.contestants).items():
        tried = sorted(
            (run.learning_rate, run.final_loss)
            for run in comparison.tuning
            if run.contestant == name and run.learning_rate is not None and run.final_loss is not None
        )
        if not tried:
            continue
        axes.plot(*zip(*tried, strict=True), marker=look.marker, linestyle=look.line, color=look.colour, label=name)
        chosen = [point for point in tried if point[0] == comparison.about(name)["learning_rate"]]
        for rate, loss in chosen:
            axes.plot(rate, loss, "o", markersize=13, markerfacecolor="none", color=look.colour)
    axes.set_xscale("log")
    ticks = sorted({run.learning_rate for run in comparison.tuning if run.learning_rate is not None})
    axes.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
    axes.minorticks_off()
    axes.set_ylabel("final held-out loss", fontsize=_TEXT_POINTS)
    axes.legend(frameon=False, fontsize=_TEXT_POINTS, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    finish(axes, "learning rate (ringed: chosen)", _TEXT_POINTS, from_zero=False)
    return _png(figure)


def trend_picture(points: Sequence[TrendPoint]) -> bytes:
    """Draw differences by the reference's tokens, a panel for each setting; bars are Student's intervals.

    One seed has none: its point is hollow.
    """
    settings = list(dict.fromkeys(point.setting for point in points))
    columns = min(2, len(settings))
    rows = -(-len(settings) // columns)
    figure = Figure(figsize=(6.6 * columns, 4.4 * rows), dpi=_DPI, layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    names = list(dict.fromkeys(point.contestant for point in points))
    lengths = {f"{point.tokens / 1e6:.2g}": point.tokens / 1e6 for point in points}
    for axes, setting in zip(panels, settings, strict=False):
        axes.axhline(0.0, color="#555555", linewidth=1)
        for index, (name, look) in enumerate(looks_of(names).items()):
            here = [point for point in points if (point.setting, point.contestant) == (setting, name)]
            # Bars at the same tokens stand beside each other, all within a tenth of the tokens either way.
            beside = 1 + min(0.04, 2 * _BESIDE / max(1, len(names) - 1)) * (index - (len(names) - 1) / 2)
            places, means = [point.tokens / 1e6 * beside for point in here], [point.difference.mean for point in here]
            bars = [math.nan if (half := point.difference.half_width) is None else half for point in here]
            if here:
                style = {"color": look.colour, "marker": look.marker, "markersize": 5}
                axes.errorbar(places, means, bars, linestyle=look.line, capsize=4, label=name, **style)
                alone = [math.isnan(bar) for bar in bars]
                axes.plot(*np.array([places, means])[:, alone], mfc="white", linestyle="none", zorder=3, **style)
        axes.set_xscale("log")
        axes.set_xlim(min(lengths.values()) / 1.4, max(lengths.values()) * 1.4)
        axes.set_xticks(list(lengths.values()), list(lengths), minor=False)
        axes.set_xticks([], minor=True)
        axes.set_title(setting, fontsize=_TEXT_POINTS, loc="left")
        finish(axes, f"million tokens of {points[0].against}", _TEXT_POINTS, from_zero=False)
        axes.tick_params(labelbottom=True)
    for axes in panels[len(settings) :]:
        axes.set_visible(False)
    for axes in panels[::columns]:
        axes.set_ylabel(f"held-out loss less {points[0].against}'s", fontsize=_TEXT_POINTS)
    drawn = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    names = [name for name in names if name in drawn]
    handles, columns = [drawn[name] for name in names], min(4 * columns, len(names))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=_TEXT_POINTS - 1)
    return _png(figure)


def _begun(comparison: Comparison) -> dict[str, list[Curves]]:
    """Return the curves of each contestant that has run, in the order of the seeds."""
    found = {
        name: [run.curves for run in comparison.of(name) if run.curves is not None] for name in comparison.contestants
    }
    return {name: curves for name, curves in found.items() if curves}


def _draw_mean(axes: Axes, runs: list[RunResult], by: str, evaluated: bool, look: Look, name: str) -> np.ndarray:
    """Draw a contestant's curve and return its settled losses, of all seeds."""
    curve = mean_curve(runs, by, evaluated)
    if curve is None:
        return np.zeros(0)
    x, losses = curve
    if not evaluated:
        losses = np.array([smooth(one, max(1, x.size // 15)) for one in losses])
    few = evaluated and x.size <= _MOST_MARKED
    marks = {"marker": look.marker, "markersize": 4.5, "markeredgecolor": "white"} if few else {}
    axes.fill_between(x, losses.min(axis=0), losses.max(axis=0), color=look.colour, alpha=0.16, linewidth=0)
    axes.plot(x, losses.mean(axis=0), color=look.colour, linestyle=look.line, linewidth=1.7, label=name, **marks)
    return _settled(losses)


def _draw_through_phases(axes: Axes, curves: Curves, colour: str, *, labelled: bool) -> list[np.ndarray]:
    """Draw a run and return its settled losses."""
    training = smooth(curves.loss, max(1, curves.step.size // 15))
    label = "training loss along the paths" if labelled else None
    axes.plot(curves.step, training, color="#999999", linewidth=0.9, label=label)
    steps, losses = curves.full_model_evaluations()
    label = "full model, held out" if labelled else None
    axes.plot(steps, losses, "o-", color=colour, markersize=4.5, linewidth=1.2, markeredgecolor="white", label=label)
    starts = curves.phase_starts()
    if labelled and len(starts) > 1:
        for step, length in starts:
            axes.axvline(step, color="#555555", linestyle=":", linewidth=1)
            at = axes.get_xaxis_transform()
            axes.text(step, 0.98, f" {length:.3g}", transform=at, va="top", color="#555555", fontsize=_TEXT_POINTS - 1)
    return [_settled(training), _settled(losses)]


def _settled(losses: np.ndarray) -> np.ndarray:
    """Return the finite values of curves (..., n) after their first steep fall, (values,)."""
    values = losses[..., int(np.ceil(losses.shape[-1] * _UNSETTLED)) if losses.shape[-1] > 2 else 0 :].ravel()
    return values[np.isfinite(values)]


def _focus(axes: Axes, settled: Sequence[np.ndarray]) -> None:
    """Make the y axis, which all panels beside these axes share, show what comes after the first steep fall."""
    values = np.concatenate([np.zeros(0), *settled])
    if values.size and np.ptp(values) > 0:
        axes.set_ylim(values.min() - 0.05 * np.ptp(values), values.max() + 0.3 * np.ptp(values))


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
