"""Export a trained model to Hugging Face transformers: python tools/export_hf.py RUN_OR_CHECKPOINT OUTPUT.

Writes a folder for transformers' from_pretrained: BERT becomes MegatronBertForMaskedLM, UL2 LlamaForCausalLM (a prefix
that is seen in both directions needs a 4-D attention mask there). The tokenizer is written too, as tokenizer.json and
as the original sentencepiece model.
"""

import argparse
import json
import logging
from pathlib import Path

import _command_line
import torch
from transformers import PreTrainedModel

from raptr_ds.checkpoint.folder import CHECKPOINTS
from raptr_ds.checkpoint.weights import TrainedModel, load_trained_model
from raptr_ds.data.loader import folders_of
from raptr_ds.data.manifest import TOKENIZER
from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.errors import ConfigError, DataError
from raptr_ds.hf.model import to_hugging_face
from raptr_ds.hf.tokenizer import tokenizer_to_hugging_face

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    """Parse the command line, convert and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="RUN_OR_CHECKPOINT", help="a run's folder, or one checkpoint")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder to write; must not contain a model")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="default: the tokenizer of the run's data")
    parser.add_argument("--precision", choices=sorted(DTYPES), default="fp32", help="of the weights (default fp32)")
    arguments = parser.parse_args()
    if (arguments.output / "config.json").exists():
        raise ConfigError(f"{arguments.output} already contains a model or a run. Name another folder, or remove it.")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    trained = load_trained_model(arguments.source)
    tokenizer = _tokenizer(arguments.tokenizer or _tokenizer_of_run(trained.folder), trained)
    model = to_hugging_face(trained.model, trained.weights).to(DTYPES[arguments.precision])  # type: ignore[arg-type]
    try:
        _write(model, tokenizer, trained, arguments.output)
    except OSError as error:
        raise ConfigError(
            f"cannot write {arguments.output}: {error.strerror or error}. Name another folder."
        ) from error
    print(f"wrote {type(model).__name__} of {trained.folder} (step {trained.step:,}) to {arguments.output}")
    if tokenizer is None:
        print("the tokenizer was not found and not written; name it with --tokenizer FILE to export it too")


def _write(model: PreTrainedModel, tokenizer: Tokenizer | None, trained: TrainedModel, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        model.config.pad_token_id = tokenizer.pad_id
        model.config.bos_token_id = tokenizer.bos_id
        model.config.eos_token_id = tokenizer.eos_id
        theirs = tokenizer_to_hugging_face(tokenizer, trained.model.architecture, trained.model.seq_length)
        theirs.save_pretrained(output)
        tokenizer.save(output / TOKENIZER)
    model.save_pretrained(output)


def _tokenizer_of_run(checkpoint: Path) -> Path | None:
    """Return the tokenizer file that the run's config.json names, None if there is none."""
    for run in (checkpoint.parent, checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINTS else checkpoint):
        if (run / "config.json").is_file():
            data = json.loads((run / "config.json").read_text(encoding="utf-8"))["raptr_ds"]["data"]
            found = Path(data.get("tokenizer") or Path(next(iter(folders_of(data["path"])))) / TOKENIZER)
            return found if found.is_file() else None
    return None


def _tokenizer(path: Path | None, trained: TrainedModel) -> Tokenizer | None:
    if path is None:
        return None
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size != trained.model.vocab_size:
        raise DataError(
            f"the tokenizer {path} has {tokenizer.vocab_size} entries, the model {trained.model.vocab_size}: it is not "
            "the one that the model was trained with. Name the right one with --tokenizer."
        )
    return tokenizer


if __name__ == "__main__":
    _command_line.run(main)
