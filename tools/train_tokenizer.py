"""Train a tokenizer for BERT and UL2: python tools/train_tokenizer.py --input PATH [PATH ...] --output FILE.

tools/prepare_data.py trains one if it is given none; this is for a tokenizer shared by several data folders, which its
option --tokenizer names.
"""

import argparse
import os
import time
from pathlib import Path

import _command_line
from prepare_data import add_corpus_arguments, add_tokenizer_arguments, corpus_sources, tokenizer_settings
from rich.console import Console

from raptr_ds.errors import DataError
from raptr_ds.prepare.tokenizer_training import train_tokenizer


def main() -> None:
    """Parse the options, train and write the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_corpus_arguments(parser)
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="the .model file to write")
    add_tokenizer_arguments(parser)
    arguments = parser.parse_args()
    console = Console(soft_wrap=True, highlight=False)
    sources = corpus_sources(arguments, os.cpu_count() or 1, console)
    begin = time.monotonic()
    tokenizer = train_tokenizer(sources, tokenizer_settings(arguments))
    try:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(arguments.output)
    except OSError as error:
        raise DataError(
            f"cannot write {arguments.output}: {error.strerror or error}. Choose another --output."
        ) from error
    console.print(
        f"{arguments.output}: {tokenizer.vocab_size:,} pieces, {len(tokenizer.sentinel_ids)} sentinels, "
        f"{time.monotonic() - begin:.1f} s"
    )


if __name__ == "__main__":
    _command_line.run(main)
