"""Quality against depth: python tools/depth.py MODEL [MODEL ...] [--output FILE.png].

MODEL: a run, one checkpoint, or a folder of tools/export_hf.py. From the whole model the layer whose removal costs
least held-out loss is removed, again and again, down to one. Prints for each depth which layers are left and their
loss, and beside it the loss of leaving the whole model after as many of its first layers; writes the table to
depth.json in the model's folder, where it is found again, and draws it, for several models in one picture.
"""

import argparse
from pathlib import Path

import _command_line
from _command_line import COUNT
from rich.console import Console
from rich.table import Table

from raptr_ds.depth.held_out import SEQUENCES, read_held_out
from raptr_ds.depth.plot import plot_depths
from raptr_ds.depth.removal import DepthRow
from raptr_ds.depth.source import labelled, open_model
from raptr_ds.depth.table import DepthTable, check_comparable, depth_table
from raptr_ds.plots.pictures import check_picture


def main() -> None:
    """Parse the command line, measure, print and draw."""
    arguments = parse()
    check_picture(arguments.output, "--output")
    sources = labelled([open_model(where, arguments.tokenizer) for where in arguments.models], arguments.models)
    texts = [read_held_out(source, arguments.data, arguments.sequences) for source in sources]
    check_comparable(sources, texts)
    console, tables = Console(markup=False, emoji=False), []
    for source, held_out in zip(sources, texts, strict=True):
        with console.status(f"{source.label}: {source.num_layers} layers") as status:

            def report(row: DepthRow, name: str = source.label) -> None:
                status.update(f"{name}: {row.depth} layers, loss {row.loss:.4f}")

            table, where = depth_table(source, held_out, on_row=report)
        tables.append(table)
        show(console, table, where)
    name = "depth.png" if len(sources) == 1 else "depth_comparison.png"
    output = arguments.output or sources[0].folder / name
    plot_depths(tables, output)
    print(f"wrote {output}")


def show(console: Console, table: DepthTable, where: str) -> None:
    """Print a table."""
    whole = table.rows[0].loss
    scaled = any(row.residual_scale != 1.0 for row in table.rows)
    shown = Table("layers", "which", "loss", "change", "left early", title=table.label, title_justify="left")
    if scaled:
        shown.add_column("scale", justify="right")
    for name in ("loss", "change", "left early"):
        next(column for column in shown.columns if column.header == name).justify = "right"
    for row in table.rows:
        cells = [str(row.depth), " ".join(map(str, row.layers)), f"{row.loss:.4f}", f"{row.loss - whole:+.4f}"]
        shown.add_row(*cells, f"{row.exit_loss:.4f}", *([f"{row.residual_scale:.3f}"] if scaled else []))
    console.print(shown)
    text = table.held_out
    print(f"{text['num_predictions']:,} predictions in {text['num_sequences']:,} held-out sequences; {where}")


def parse() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL", help="a run, a checkpoint, an exported folder")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="prepared held-out text (default: the run's own)")
    parser.add_argument(
        "--sequences", type=COUNT, metavar="N", default=SEQUENCES, help=f"of that text (default {SEQUENCES})"
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="of a checkpoint that lies outside of its run")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.png",
        help="default: depth.png in the model's folder; for several, depth_comparison.png in the first's",
    )
    return parser.parse_args()


if __name__ == "__main__":
    _command_line.run(main)
