"""See what the length of training changes: python tools/trend.py COMPARISON [COMPARISON ...] [--contestants NAME ...].

COMPARISON: a folder that tools/experiment.py has written, or a copy of it by --keep. All begin with the same contestant
and train for longer or shorter. Prints how far each other one is from the first of its comparison, paired by seed,
with Student's 95% interval, and draws it over the tokens that the first one was trained on.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import _command_line

from raptr_ds.plots.pictures import check_picture


def main() -> None:
    """Parse the command line, read the comparisons, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparisons", nargs="+", type=Path, metavar="COMPARISON", help="a comparison's folder")
    parser.add_argument(
        "--contestants",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="these alone, beside each comparison's first (default: all)",
    )
    parser.add_argument("--output", type=Path, default=Path("trend.png"), metavar="FILE.png", help="default: trend.png")
    arguments = parser.parse_args()
    check_picture(arguments.output, "--output", ("png",))
    write_trend(arguments.comparisons, arguments.contestants, arguments.output)


def write_trend(folders: Sequence[Path], contestants: Sequence[str] | None, output: Path) -> None:
    """Print the table and write the picture."""
    from raptr_ds.lab.comparison import load_comparison  # torch takes seconds to import: check the command line before
    from raptr_ds.lab.paired import CONFIDENCE
    from raptr_ds.lab.plots import trend_picture
    from raptr_ds.lab.trend import trend
    from raptr_ds.markdown import markdown_table

    points = trend([load_comparison(folder) for folder in folders], contestants)
    head = ["setting", "tokens", "contestant", "n", f"against {points[0].against}", "seeds below"]
    rows = []
    for point in points:
        found = point.difference
        below = f"{found.num_lower} of {found.n}"
        rows.append([point.setting, f"{point.tokens:,.0f}", point.contestant, found.n, found, below])
    print("\n".join(markdown_table(head, rows)))
    print(
        f"\n±: half of Student's {CONFIDENCE:.0%} interval of differences paired by seed; * the interval excludes zero"
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(trend_picture(points))
    print(f"wrote {output}")


if __name__ == "__main__":
    _command_line.run(main)
