"""Plot one run or several: python tools/plot_run.py RUN_FOLDER [RUN_FOLDER ...] [--output FILE.png].

Reads each folder's metrics.jsonl and plots the loss by step and by executed FLOPs, and the paths, as one PNG. Works
during a run too.
"""

import argparse
import sys
from pathlib import Path

import _command_line

from raptr_ds.plots.curves import incomparable, load_all_curves
from raptr_ds.plots.pictures import check_picture
from raptr_ds.plots.runs import plot_runs


def main() -> None:
    """Parse the command line, read the metrics and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_FOLDER", help="a run's folder (raptr_ds.train.save)")
    parser.add_argument(
        "--output", type=Path, help="default: plot.png in the run's folder; for several, comparison.png in the first's"
    )
    arguments = parser.parse_args()
    check_picture(arguments.output, "--output")
    name = "plot.png" if len(arguments.runs) == 1 else "comparison.png"
    output = arguments.output or arguments.runs[0] / name
    curves = load_all_curves(arguments.runs)
    if why := incomparable(curves):
        print(f"warning: {why}", file=sys.stderr)
    plot_runs(curves, output)
    print(f"wrote {output}")


if __name__ == "__main__":
    _command_line.run(main)
