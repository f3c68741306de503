"""Begin from a model of Hugging Face transformers: python tools/import_hf.py FOLDER RUN.

FOLDER: as tools/export_hf.py or save_pretrained writes it, with a MegatronBertForMaskedLM, a EsmForMaskedLM (rotary, no
embedding norm, no token dropout) or a LlamaForCausalLM (as many key heads as heads). Writes a checkpoint of step 0 to
RUN, and prints what a run file says to begin from it.
"""

import argparse
import json
from pathlib import Path

import _command_line


def main() -> None:
    """Parse the command line, import, and print what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a model of transformers")
    parser.add_argument("output", type=Path, metavar="RUN", help="folder to write; must not hold checkpoints already")
    parser.add_argument("--optimizer", default="AdamW", help="optimizer.type of the run file (default AdamW)")
    arguments = parser.parse_args()
    from raptr_ds.hf.import_folder import import_folder  # transformers takes seconds: check the command line before

    _command_line.quiet_transformers()
    done = import_folder(arguments.folder, arguments.output, arguments.optimizer)
    print(f"wrote {done.checkpoint} of a {done.kind}. In a run file that begins from it:")
    model = json.dumps(done.model.model_dump(mode="json"))
    print(f'"raptr_ds": {{"checkpoint": {{"load": "{arguments.output}"}}, "model": {model}, ...}}')
    if done.tokenizer is not None:
        print(f"the data must be prepared with its tokenizer: tools/prepare_data.py --tokenizer {done.tokenizer}")
    else:
        print(
            "no tokenizer of ours is beside it, and none is recorded: its tokenizer must be the one that the data are "
            "prepared with (tools/prepare_data.py --tokenizer FILE)"
        )


if __name__ == "__main__":
    _command_line.run(main)
