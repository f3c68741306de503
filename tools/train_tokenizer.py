"""Train a tokenizer for BERT and UL2: python tools/train_tokenizer.py --input PATH [PATH ...] --output FILE.

tools/prepare_data.py trains one if it is given none; this is for a tokenizer shared by several data folders, which its
option --tokenizer names.
"""

import argparse
import time

import _command_line
from prepare_data import add_corpus_arguments, add_tokenizer_arguments, corpus_sources, given_path, tokenizer_settings
from rich.console import Console

from raptr_ds.prepare.tokenizer_training import train_tokenizer
from raptr_ds.user_paths import check_output, writing


def main() -> None:
    """Parse the options, train and write the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_corpus_arguments(parser)
    parser.add_argument("--output", required=True, type=given_path, metavar="FILE", help="the .model file to write")
    add_tokenizer_arguments(parser)
    arguments = parser.parse_args()
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    settings = tokenizer_settings(arguments)
    sources = corpus_sources(arguments, _command_line.processors(), console)
    check_output(arguments.output, "--output", "tokenizer.model")
    begin = time.monotonic()
    tokenizer = train_tokenizer(sources, settings)
    with writing(arguments.output, "Choose another --output."):
        tokenizer.save(arguments.output)
    console.print(
        f"{arguments.output}: {tokenizer.vocab_size:,} pieces, {len(tokenizer.sentinel_ids)} sentinels, "
        f"{time.monotonic() - begin:.1f} s"
    )


if __name__ == "__main__":
    _command_line.run(main)
