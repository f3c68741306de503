"""Experiments on the theory of random paths: python tools/theory.py polynomials|stability|transitions [--plot FILE].

polynomials: how well growing, constant and shrinking paths learn each degree of a polynomial (skipped layers frozen, as
in RaPTr). stability: how much the loss changes without a random layer, by depth, with and without residual connections
and layer norm, at initialization and through training. transitions RUN: how the loss of a run's paths changes where
their length does, from its checkpoints. Each prints a Markdown table and draws a plot; one CPU is enough.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import _command_line
import numpy as np
import torch
from _command_line import COUNT

from raptr_ds.parallel.launch import prepare_imports
from raptr_ds.plots.pictures import check_picture
from raptr_ds.plots.studies import plot_polynomials, plot_stability, plot_transitions
from raptr_ds.theory.polynomials import PolynomialCurve, PolynomialSettings, learn, path_methods, polynomial_table
from raptr_ds.theory.stability import (
    VARIANTS,
    StabilitySettings,
    gaps_in_training,
    initial_gaps,
    initial_table,
    training_table,
)


def polynomials(arguments: argparse.Namespace) -> None:
    """Learn the polynomial with each kind of path; print and plot."""
    settings = PolynomialSettings()
    settings = replace(settings, steps=arguments.steps or settings.steps, schedule=arguments.schedule)
    curves: dict[str, list[PolynomialCurve]] = {}
    for seed in range(arguments.seeds or 1):
        for name, method in path_methods(settings, seed).items():
            curves.setdefault(name, []).append(learn(settings, method, seed))
    print("\n".join(polynomial_table(curves)))
    means = {name: (runs[0].steps, np.mean([run.errors for run in runs], axis=0)) for name, runs in curves.items()}
    plot_polynomials(means, arguments.plot)


def stability(arguments: argparse.Namespace) -> None:
    """Measure the gaps; print and plot."""
    settings = StabilitySettings(branch=arguments.branch)
    settings = replace(settings, steps=arguments.steps or settings.steps, seeds=arguments.seeds or settings.seeds)
    initial = {variant: initial_gaps(settings, variant) for variant in VARIANTS}
    training = {
        variant: {depth: list(gaps_in_training(settings, variant, depth)) for depth in settings.trained_depths}
        for variant in VARIANTS
    }
    print("\n".join([*initial_table(settings, initial), "", *training_table(training)]))
    curves = {
        f"{variant}, L = {depth}": ([step for step, _ in curve], [gap.signed for _, gap in curve])
        for variant, by_depth in training.items()
        for depth, curve in by_depth.items()
    }
    absolute = {variant: [gap.absolute for gap in gaps] for variant, gaps in initial.items()}
    plot_stability(settings.depths, absolute, curves, arguments.plot)


def transitions(arguments: argparse.Namespace) -> None:
    """Measure the loss before and after each phase transition of a run; print and plot."""
    prepare_imports(has_gpu=False)
    from raptr_ds.theory.transitions import transition_table, transitions_of

    found = transitions_of(arguments.run, arguments.paths, arguments.batches)
    print("\n".join(transition_table(found)))
    plot_transitions(found, arguments.plot)


def main() -> None:
    """Run the experiment and print where its plot is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="experiment", required=True, metavar="EXPERIMENT")
    for function in (polynomials, stability, transitions):
        name = function.__name__
        command = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        command.set_defaults(function=function)
        command.add_argument("--plot", type=Path, default=Path("runs", "theory", f"{name}.png"), help="PNG to write")
        if function is transitions:
            command.add_argument(
                "run", type=Path, metavar="RUN", help="folder of a run with checkpoints at its transitions"
            )
            command.add_argument("--paths", type=COUNT, default=16, help="paths of each phase (default: %(default)s)")
            command.add_argument("--batches", type=COUNT, default=4, help="held-out batches (default: %(default)s)")
            continue
        command.add_argument("--seeds", type=COUNT, help="repetitions (default: 1 of polynomials, 8 of stability)")
        command.add_argument("--steps", type=COUNT, help="training steps (default: 1000 and 200)")
        if function is polynomials:
            command.add_argument("--schedule", default=PolynomialSettings.schedule, help="default: %(default)s")
        else:
            branches = ("linear", "mlp")
            command.add_argument("--branch", choices=branches, default="linear", help="a layer (default: %(default)s)")
    arguments = parser.parse_args()
    check_picture(arguments.plot, "--plot")
    torch.set_num_threads(1)  # the networks are small: more threads would wait for each other
    begin = time.process_time()
    arguments.function(arguments)
    print(f"\nwrote {arguments.plot} after {time.process_time() - begin:.0f} s of one core")


if __name__ == "__main__":
    _command_line.run(main)
