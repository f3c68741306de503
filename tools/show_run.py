"""See what a trained model does: python tools/show_run.py RUN.

RUN: a run, one checkpoint, or a folder of tools/export_hf.py. Prints held-out sentences with what the model fills in
and how sure it is (BERT: masked words; UL2: missing words, and how a sentence goes on), and the held-out loss of the
whole model and with three quarters and half of its layers. Takes seconds for a small model.
"""

import argparse
import math
from fractions import Fraction
from pathlib import Path

import _command_line
from _command_line import COUNT, whole_number
from rich.console import Console
from rich.text import Text

from raptr_ds.data.tokenizer import WORD_BOUNDARY, Tokenizer
from raptr_ds.depth.guesses import Blank, FilledText, Guess
from raptr_ds.depth.held_out import read_held_out
from raptr_ds.depth.network import open_network
from raptr_ds.depth.removal import DepthRow
from raptr_ds.depth.showing import shown_depths, shown_sentences
from raptr_ds.depth.source import ModelSource, open_model

SEQUENCES = 32
NEWLINE = "\u21b5"
WHAT = {"mask": "hidden", "infill": "hidden", "continue": "goes on"}
NAMES = {1: "all", 0.75: "3/4", 0.5: "half"}


def main() -> None:
    """Parse the command line, run the model and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run, a checkpoint, or an exported folder")
    parser.add_argument("--sentences", type=whole_number(0), default=5, metavar="N", help="how many (default 5)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of their choice (default 0)")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="prepared held-out text (default: the run's own)")
    parser.add_argument(
        "--sequences", type=COUNT, metavar="N", default=SEQUENCES, help=f"of it for the loss (default {SEQUENCES})"
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="of a checkpoint that lies outside of its run")
    arguments = parser.parse_args()
    source = open_model(arguments.run, arguments.tokenizer)
    held_out = read_held_out(source, arguments.data, arguments.sequences)
    console = Console(highlight=False)
    with open_network(source.trained) as network:
        console.print(Text(f"\nWhat {source.label} fills in, in held-out text", style="bold"))
        for shown in shown_sentences(network, source, held_out, arguments.sentences, arguments.seed):
            console.print(sentence(source.tokenizer, shown))
        console.print(losses(source, held_out.num_predictions, shown_depths(network, source, held_out)))


def sentence(tokenizer: Tokenizer, shown: FilledText) -> Text:
    """Return a sentence with its blanks filled, and below it what else the model thought of, and what is right."""
    text = Text("\n  ")
    for part, spaced in with_spaces(tokenizer, shown):
        if isinstance(part, Blank):
            best = part.guesses[0]
            text.append(" " if spaced else "")
            text.append(
                written(tokenizer, best), style="bold green" if best.tokens == part.right.tokens else "bold yellow"
            )
            text.append(f" ({best.probability:.0%})", style="dim")
        else:
            text.append((" " if spaced else "") + tokenizer.decode(part))
    for part in shown.parts:
        if isinstance(part, Blank):
            others = ", ".join(f"{written(tokenizer, one)} {one.probability:.0%}" for one in part.guesses[1:])
            text.append(f"\n    {WHAT[shown.kind]}: ", style="dim")
            text.append(written(tokenizer, part.right))
            sure = part.right.probability
            text.append("" if math.isnan(sure) else f" ({sure:.1%})")
            text.append(f"; other guesses: {others}" if others else "", style="dim")
    return text


def with_spaces(tokenizer: Tokenizer, text: FilledText) -> list[tuple[tuple[int, ...] | Blank, bool]]:
    """Return the parts that are not empty, each with whether a space is before it."""
    parts = []
    for part in text.parts:
        tokens = part.right.tokens if isinstance(part, Blank) else part
        if tokens:
            begins = tokenizer.pieces(tokens[:1])[0].startswith(WORD_BOUNDARY)
            parts.append((part, begins and bool(parts)))
    return parts


def written(tokenizer: Tokenizer, guess: Guess) -> str:
    """Return a guess as text on one line."""
    lines = tokenizer.decode(guess.tokens).strip(" ").replace("\n", NEWLINE)
    return lines or " ".join(tokenizer.pieces(guess.tokens)) or "nothing"


def losses(source: ModelSource, num_predictions: int, rows: list[tuple[Fraction, DepthRow]]) -> Text:
    """Return the loss at each depth, with the layers that are left."""
    text = Text(f"\nHeld-out loss of {source.label}, by depth", style="bold")
    text.append(f" (nats per token, {num_predictions:,} of them)\n", style="not bold dim")
    for share, row in rows:
        kept = "" if row.depth == source.num_layers else f"   layers {' '.join(map(str, row.layers))}"
        name = f"{NAMES[float(share)]} {row.depth}".rjust(8)
        text.append(f"  {name} layers  {row.loss:.4f}{kept}\n", style="not bold")
    return text


if __name__ == "__main__":
    _command_line.run(main)
