"""Plots of studies: how paths speed up on longer pipelines, and the experiments on the theory of random paths."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raptr_ds.plots.pictures import COLOURS, GREY


def plot_scaling(
    stages: Sequence[int],
    speed_ups: Mapping[str, Mapping[str, Sequence[float]]],
    ideal: Mapping[str, float],
    file: Path,
) -> None:
    """Write a PNG of speed-up by the number of pipeline stages, one panel for each path length.

    speed_ups: panel title -> sampling -> a value for each number of stages; ideal: by panel title.
    """
    figure = Figure(figsize=(4.6 * len(speed_ups), 4.0), dpi=90, layout="constrained")
    for index, (title, curves) in enumerate(speed_ups.items()):
        axes = figure.add_subplot(1, len(speed_ups), index + 1)
        axes.axhline(ideal[title], color=GREY, linewidth=1, linestyle="--", label="by FLOPs")
        for colour, (name, values) in zip(COLOURS, curves.items(), strict=False):
            axes.plot(stages, values, color=colour, marker="o", markersize=4, label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(stages), [str(count) for count in stages])
        axes.set_ylim(bottom=0.95)
        _finish(axes, title, "pipeline stages", "" if index else "speed-up over the full path")
        if index == 0:
            axes.legend(fontsize=9, frameon=False)
    _save(figure, file)


def plot_polynomials(curves: Mapping[str, tuple[Sequence[int], np.ndarray]], file: Path) -> None:
    """Write a PNG with a panel for each training method. curves: name -> (steps, errors of shape (steps, degrees))."""
    figure = Figure(figsize=(3.2 * len(curves), 3.6), dpi=90, layout="constrained")
    for index, (name, (steps, errors)) in enumerate(curves.items()):
        axes = figure.add_subplot(1, len(curves), index + 1)
        for degree, colour in zip(range(errors.shape[1]), COLOURS, strict=False):
            axes.plot(steps, np.maximum(errors[:, degree], 1e-4), color=colour, label=f"degree {degree + 1}")
        axes.set_yscale("log")
        axes.set_ylim(1e-4, 20)
        _finish(axes, name, "step", "" if index else "error of the full model")
        if index == 0:
            axes.legend(fontsize=8, frameon=False)
    _save(figure, file)


def plot_stability(
    depths: Sequence[int],
    initial: Mapping[str, Sequence[float]],
    training: Mapping[str, tuple[Sequence[int], Sequence[float]]],
    file: Path,
) -> None:
    """Write a PNG. initial: variant -> gap at each depth; training: curve -> (steps, increase of the loss)."""
    figure = Figure(figsize=(11.5, 4.0), dpi=90, layout="constrained")
    axes = figure.add_subplot(1, 2, 1)
    for colour, (name, gaps) in zip(COLOURS, initial.items(), strict=False):
        axes.plot(depths, gaps, color=colour, marker="o", markersize=4, label=name)
    first = next(iter(initial.values()))
    guide = first[-1] * np.sqrt(depths[-1] / np.array(depths))
    axes.plot(depths, guide, color=GREY, linestyle="--", linewidth=1, label="1/sqrt(L)")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(list(depths), [str(depth) for depth in depths])
    _finish(axes, "at initialization, paths of L - 1 layers", "layers L", "gap in an example's loss")
    axes.legend(fontsize=8, frameon=False)
    axes = figure.add_subplot(1, 2, 2)
    for name, (steps, gaps) in training.items():
        variant = next(index for index, known in enumerate(initial) if name.startswith(known))
        same = [other for other in training if other.startswith(list(initial)[variant])]
        width = 0.7 + 0.8 * same.index(name)
        axes.plot(steps, gaps, color=COLOURS[variant], linewidth=width, label=name)
    _finish(axes, "through training of the full model", "step", "loss of paths minus the full model's")
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _save(figure, file)


def plot_transitions(transitions: Sequence[Any], file: Path) -> None:
    """Write a PNG: the held-out loss of every sampled path before and after each transition, and the full model's.

    transitions: with the fields of raptr_ds.theory.transitions.Transition.
    """
    figure = Figure(figsize=(1.8 + 1.9 * len(transitions), 3.8), dpi=90, layout="constrained")
    axes = figure.add_subplot()
    for index, one in enumerate(transitions):
        for side, length, losses in ((-0.2, one.before, one.before_losses), (0.2, one.after, one.after_losses)):
            place = index + side
            axes.plot([place] * len(losses), losses, "o", color=COLOURS[0], markersize=3, alpha=0.5)
            axes.plot([place - 0.1, place + 0.1], [np.mean(losses)] * 2, color=COLOURS[0], linewidth=2)
            axes.annotate(f"{length}", (place, min(losses)), xytext=(0, -13), textcoords="offset points", ha="center")
        label = "full model" if index == 0 else None
        axes.plot([index - 0.35, index + 0.35], [one.full_loss] * 2, color=COLOURS[1], linestyle="--", label=label)
    axes.margins(y=0.15)
    axes.set_xticks(range(len(transitions)), [f"step {one.step}" for one in transitions])
    _finish(axes, "", "", "held-out loss of paths, and their mean")
    axes.legend(fontsize=8, frameon=False)
    _save(figure, file)


def _finish(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
