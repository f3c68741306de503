"""Give a trained model to Hugging Face transformers: python tools/export_hf.py RUN_OR_CHECKPOINT OUTPUT.

Writes a folder for transformers' from_pretrained: BERT becomes MegatronBertForMaskedLM, UL2 LlamaForCausalLM (a prefix
that is seen in both directions needs a 4-D attention mask there). The tokenizer goes with it, as tokenizer.json and as
the sentencepiece model that it was, if it gives the same ids as ours: for difficult texts, and for validation documents
of the run as far as its data folder is there.
"""

import argparse
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import _command_line
import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from raptr_ds.checkpoint.folder import CHECKPOINTS, checkpoints_at
from raptr_ds.checkpoint.manifest import DamagedCheckpointError
from raptr_ds.checkpoint.weights import TrainedModel, load_trained_model
from raptr_ds.data.indexed import open_indexed
from raptr_ds.data.loader import folders_of
from raptr_ds.data.manifest import TOKENIZER
from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.errors import CheckpointError, ConfigError, DataError
from raptr_ds.hf.model import to_hugging_face
from raptr_ds.hf.tokenizer import SAMPLE_TEXTS, check_same_ids, tokenizer_to_hugging_face

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COMPARED_DOCUMENTS = 300  # of each data folder, and of each document the beginning
COMPARED_TOKENS = 1000


@dataclass(frozen=True)
class RunData:
    """What a run's config.json names. folders: the prepared ones; tokenizer: its file."""

    folders: tuple[Path, ...]
    tokenizer: Path


def main() -> None:
    """Parse the command line, convert and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="RUN_OR_CHECKPOINT", help="a run's folder, or one checkpoint")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder to write; must not hold a model already")
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="default: the one that the run's data have; none: weights only"
    )
    parser.add_argument("--precision", choices=sorted(DTYPES), default="fp32", help="of the weights (default fp32)")
    arguments = parser.parse_args()
    if os.access(arguments.output / "config.json", os.F_OK):
        raise ConfigError(f"{arguments.output} holds a model or a run already. Name another folder, or remove it.")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    trained = load_model(arguments.source)
    data = None if arguments.tokenizer == "none" else read_run_data(trained.folder)
    tokenizer = load_tokenizer(arguments.tokenizer, data, trained)
    exported = None
    if tokenizer is not None:
        exported = tokenizer_to_hugging_face(tokenizer, trained.model.architecture, trained.model.seq_length)
        check_same_ids(tokenizer, exported, chain(SAMPLE_TEXTS, validation_texts(data, tokenizer)))
    model = to_hugging_face(trained.model, trained.weights, tokenizer)
    model.to(DTYPES[arguments.precision])  # type: ignore[arg-type]
    try:
        write(arguments.output, model, tokenizer, exported)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"cannot write {arguments.output}: {getattr(error, 'strerror', None) or error}. Name another folder."
        ) from error
    print(f"wrote {type(model).__name__} of {trained.folder} (step {trained.step:,}) to {arguments.output}")
    if tokenizer is None:
        print("without a tokenizer: name it with --tokenizer FILE to have it beside the model")


def load_model(source: Path) -> TrainedModel:
    """Return the newest model of a run, or the one of a checkpoint. Raises: CheckpointError naming the folder."""
    try:
        folder = checkpoints_at(source)[0]
        try:
            return load_trained_model(folder)
        except DamagedCheckpointError as error:
            raise CheckpointError(
                f"the checkpoint {folder} is damaged: {error}. Name another step-... folder of the run."
            ) from error
    except OSError as error:
        raise CheckpointError(
            f"cannot read the checkpoints in {source}: {error.strerror or error}. Check its permissions."
        ) from error


def read_run_data(checkpoint: Path) -> RunData | None:
    """Return the data of the run that a checkpoint lies in; None without the run's config.json.

    Raises: ConfigError if config.json cannot be read or does not name the data.
    """
    folder = checkpoint.absolute().parent
    config = (folder.parent if folder.name == CHECKPOINTS else folder) / "config.json"
    try:
        content = json.loads(config.read_text(encoding="utf-8"))["raptr_ds"]["data"]
        folders = tuple(map(Path, folders_of(content["path"])))
        return RunData(folders, Path(content.get("tokenizer") or folders[0] / TOKENIZER))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"cannot read {config}: {error.strerror or error}. Check its permissions.") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{config} is damaged, or not the configuration of a run: raptr_ds.data.path, which leads to the "
            f"tokenizer, cannot be read ({type(error).__name__}: {error}). Restore it, or move it away and name the "
            "tokenizer with --tokenizer FILE."
        ) from error


def load_tokenizer(named: str | None, data: RunData | None, trained: TrainedModel) -> Tokenizer | None:
    """Return the tokenizer that the user or the run names, None if neither does.

    Raises: DataError if it cannot be read, or has another size than the model's vocabulary.
    """
    path = Path(named) if named else data and data.tokenizer
    if named == "none" or path is None:
        return None
    if not named and not os.access(path, os.R_OK):
        raise DataError(
            f"the tokenizer {path}, which the run's config.json leads to, is not there or cannot be read. Name it with "
            "--tokenizer FILE, or export the weights without it by --tokenizer none."
        )
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size != trained.model.vocab_size:
        raise DataError(
            f"the tokenizer {path} has {tokenizer.vocab_size} entries, the model {trained.model.vocab_size}: it is not "
            "the one that the model was trained with. Name that one with --tokenizer."
        )
    return tokenizer


def validation_texts(data: RunData | None, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the beginnings of documents in the run's validation data, as far as these can be read."""
    for folder in data.folders if data else ():
        try:
            documents = open_indexed(folder / "validation", tokenizer.vocab_size)
        except (DataError, OSError):  # moved or deleted since training, or prepared anew: no reason not to export
            continue
        for index in range(min(COMPARED_DOCUMENTS, len(documents.lengths))):
            yield tokenizer.decode(documents.document(index)[:COMPARED_TOKENS])


def write(
    output: Path, model: PreTrainedModel, tokenizer: Tokenizer | None, exported: PreTrainedTokenizerFast | None
) -> None:
    """Write the folder."""
    output.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None and exported is not None:
        tokenizer.save(output / TOKENIZER)
        exported.save_pretrained(output)
    model.save_pretrained(output)


if __name__ == "__main__":
    _command_line.run(main)
