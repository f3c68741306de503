"""Give a trained model to Hugging Face transformers: python tools/export_hf.py RUN_OR_CHECKPOINT OUTPUT.

Writes a folder for transformers' from_pretrained: BERT becomes MegatronBertForMaskedLM, with rotary positions
EsmForMaskedLM, UL2 LlamaForCausalLM (whose prefix is seen in both directions by tools/generate.py, or with a 4-D
attention mask). The tokenizer goes with it, as tokenizer.json and as the sentencepiece model that it was, if it gives
the same ids as ours; and README.md, a model card with the run's numbers.

--layers writes a shallower model: `--layers 6` six layers, evenly spaced; `--layers 0,2,5` these, counted from 0 (of
one layer: `0,`); `--layers best:6` the six that are left when the layer whose removal costs least held-out loss is
removed again and again (`best`: half of the layers).
"""

import argparse
from functools import partial
from pathlib import Path

import _command_line
import torch
from _command_line import COUNT

from raptr_ds.checkpoint.weights import TrainedModel
from raptr_ds.depth.held_out import SEQUENCES, read_held_out
from raptr_ds.depth.removal import DepthRow, LayerChoice, parse_layers
from raptr_ds.depth.source import source_of
from raptr_ds.depth.table import depth_table
from raptr_ds.hf.export import LARGEST_SHARD, check_exportable, export
from raptr_ds.hf.shallower import Kept
from raptr_ds.hf.source import WITHOUT

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    """Parse the command line, export, and print what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="RUN_OR_CHECKPOINT", help="a run's folder, or one checkpoint")
    parser.add_argument(
        "output", type=Path, nargs="?", metavar="OUTPUT", help="folder to write; must not hold a model already"
    )
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="default: the one that the run's data have; none: weights only"
    )
    parser.add_argument("--precision", choices=sorted(DTYPES), default="fp32", help="of the weights (default fp32)")
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        default=LARGEST_SHARD,
        help=f"of a file of weights, as 500MB or 5GB (default {LARGEST_SHARD})",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="export nothing: find out whether the run of a config.json can be; RUN_OR_CHECKPOINT is that file, or -",
    )
    parser.add_argument("--layers", metavar="N|LIST|best:N", help="a shallower model: see above (default: all layers)")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="held-out text for best (default: the run's own)")
    parser.add_argument("--sequences", type=COUNT, metavar="N", help=f"of that text (default {SEQUENCES})")
    arguments = parser.parse_args()
    choice = None if arguments.layers is None else parse_layers(arguments.layers)
    for option in ("data", "sequences"):
        if getattr(arguments, option) is not None and not (choice and choice.is_best):
            parser.error(f"--{option} is about the held-out text that --layers best measures. Leave it out.")
    _command_line.quiet_transformers()
    if arguments.check:
        check_exportable(arguments.source)
        print("this run can be exported")
        return
    if arguments.output is None:
        parser.error("the following arguments are required: OUTPUT")
    dtype = DTYPES[arguments.precision]
    done = export(
        arguments.source,
        arguments.output,
        dtype,
        arguments.tokenizer,
        arguments.max_shard_size,
        None if choice is None else partial(choose, arguments, choice),
    )
    print(f"wrote {done.kind} of {done.folder} (step {done.step:,}) to {arguments.output}")
    if not done.has_tokenizer:
        print("without a tokenizer: name it with --tokenizer FILE to have it beside the model")
    if done.kept is not None:
        layers = ", ".join(map(str, done.kept.path.layers))
        print(
            f"layers {layers} of {done.kept.path.num_layers}"
            + ("" if done.kept.loss is None else f", held-out loss {done.kept.loss:.4f}")
        )


def choose(arguments: argparse.Namespace, choice: LayerChoice, trained: TrainedModel) -> Kept:
    """Return the layers that --layers asks for; for best, from the run's depth table or measured."""
    tokenizer = None if arguments.tokenizer == WITHOUT else arguments.tokenizer
    source = source_of(trained, tokenizer, arguments.source)

    def best(depth: int) -> DepthRow:
        sequences = SEQUENCES if arguments.sequences is None else arguments.sequences
        held_out = read_held_out(source, arguments.data, sequences)
        return depth_table(source, held_out)[0].row(depth)

    return choice.kept(source, best)


if __name__ == "__main__":
    _command_line.run(main)
