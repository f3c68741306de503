"""Continue a text, or fill in its missing words, with a UL2 model: python tools/generate.py MODEL "PROMPT".

MODEL: a folder of tools/export_hf.py, a run, or one checkpoint. Prints what follows the prompt as it comes; the prompt
is seen in both directions, or with --causal from left to right alone. --infill prints the prompt with <extra_id_0>,
<extra_id_1>, ... in it filled in.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import _command_line

from raptr_ds.data.tokenizer import MODE_NAMES


def main() -> None:
    """Parse the command line, generate, and print the text as it comes."""
    arguments = parse()
    from raptr_ds.hf.generation import Sampling  # transformers takes seconds to import: check the command line before
    from raptr_ds.hf.load import load_prefix_model
    from raptr_ds.hf.text import complete, prompt_tokens

    _command_line.quiet_transformers()
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
    loaded = load_prefix_model(arguments.model, arguments.tokenizer)
    choice = arguments.mode or ("NLU" if arguments.infill else "S2S")
    tokens = prompt_tokens(loaded.tokenizer, arguments.prompt, None if choice == "none" else f"[{choice}]")
    end = complete(
        loaded,
        tokens,
        partial(print, end="", flush=True),
        fills=arguments.infill,
        max_new_tokens=arguments.max_new_tokens,
        sampling=sampling,
        prefix_length=0 if arguments.causal else None,
    )
    print()
    if end == "longest sequence":
        longest = loaded.model.config.max_position_embeddings
        print(f"cut off at the model's longest sequence, {longest:,} tokens", file=sys.stderr)


def parse() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = partial(parser.add_argument, metavar="N")
    parser.add_argument("model", type=Path, metavar="MODEL", help="an exported folder, a run's folder, or a checkpoint")
    parser.add_argument("prompt", metavar="PROMPT", help="the text to continue, or to fill in")
    parser.add_argument("--infill", action="store_true", help="fill in <extra_id_0>, <extra_id_1>, ... of the prompt")
    parser.add_argument(
        "--causal", action="store_true", help="read the prompt from left to right alone, for comparison"
    )
    parser.add_argument(
        "--mode", choices=[*MODE_NAMES, "none"], help="UL2's mode token (default S2S; with --infill NLU)"
    )
    add("--max-new-tokens", type=int, default=128, help="default 128")
    add("--temperature", type=float, default=0.0, help="default 0: the likeliest token at each place")
    add("--top-k", type=int, help="draw among the N likeliest tokens")
    add("--top-p", type=float, help="draw among the likeliest tokens that together have this probability")
    add("--seed", type=int, default=0, help="of the draws (default 0)")
    parser.add_argument("--tokenizer", metavar="FILE", help="of a checkpoint that lies outside of its run")
    return parser.parse_args()


if __name__ == "__main__":
    _command_line.run(main)
