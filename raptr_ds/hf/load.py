"""A prefix language model to generate with, from an exported folder, a run or a checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from raptr_ds.checkpoint.weights import TrainedModel
from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.errors import ConfigError
from raptr_ds.hf.model import to_hugging_face
from raptr_ds.hf.source import exported_kind, load_model, needed_tokenizer, tokenizer_beside
from raptr_ds.user_paths import is_file

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class PrefixModel:
    """A model in evaluation mode, with its tokenizer."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast


def load_prefix_model(where: Path, tokenizer: str | None = None, device: str | None = None) -> PrefixModel:
    """Return the model in a folder that tools/export_hf.py wrote, of a run's newest checkpoint, or of one checkpoint.

    tokenizer: a sentencepiece file, where a run's or a checkpoint's own is not to be found. device: by default a GPU if
    there is one.
    Raises: ConfigError, DataError or CheckpointError for a folder that holds no such model, or no tokenizer.
    """
    kind = exported_kind(where)
    loaded = _from_checkpoint(where, tokenizer) if kind is None else _from_export(where, kind, tokenizer)
    loaded.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))  # type: ignore[arg-type]
    return loaded


def _from_export(where: Path, kind: str, tokenizer: str | None) -> PrefixModel:
    if kind != LlamaForCausalLM.__name__:
        raise ConfigError(
            f"{where} holds a {kind}, and only {LlamaForCausalLM.__name__} continues a text. A BERT model fills in "
            f"masked words: transformers' pipeline('fill-mask', model='{where}'). For tasks it is fine-tuned: "
            "tools/finetune.py."
        )
    refuse_tokenizer(where, tokenizer)
    theirs = exported_tokenizer(where)
    model = load_exported(where, LlamaForCausalLM)
    assert isinstance(model, LlamaForCausalLM)
    check_size(where, theirs, model.config)
    return PrefixModel(model, theirs)


def refuse_tokenizer(where: Path, named: str | None) -> None:
    """Raise ConfigError if a tokenizer is named for an exported model, which has its own."""
    if named is not None:
        raise ConfigError(f"--tokenizer is for runs and checkpoints: {where} is an exported model. Leave it out.")


def check_size(where: Path, tokenizer: PreTrainedTokenizerFast, config: PreTrainedConfig) -> None:
    """Raise ConfigError if the tokenizer in a folder has ids that the model lacks."""
    if len(tokenizer) > config.vocab_size:
        raise ConfigError(
            f"the tokenizer in {where} has {len(tokenizer):,} entries, the model {config.vocab_size:,}: it is another "
            "model's. Export the model with its own."
        )


def exported_tokenizer(where: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer in an exported folder. Raises: ConfigError if there is none, or it cannot be loaded."""
    if not any(is_file(where / name) for name in _TOKENIZER_FILES):
        raise ConfigError(
            f"{where} has no tokenizer: {' or '.join(_TOKENIZER_FILES)}. Export the model with it, by "
            "tools/export_hf.py RUN_OR_CHECKPOINT OUTPUT --tokenizer FILE."
        )
    try:
        return AutoTokenizer.from_pretrained(where, local_files_only=True)
    except Exception as error:  # as below
        raise _not_loaded(where, "tokenizer", error) from error


def exported_config(where: Path) -> PreTrainedConfig:
    """Return the configuration in an exported folder. Raises: ConfigError if it cannot be loaded."""
    try:
        return AutoConfig.from_pretrained(where, local_files_only=True)
    except Exception as error:  # as below
        raise _not_loaded(where, "config.json", error) from error


def load_exported(
    where: Path, kind: Any, may_lack: Callable[[PreTrainedModel, str], bool] = lambda model, name: False, **options: Any
) -> PreTrainedModel:
    """Return the model in a folder of transformers, in evaluation mode, in the precision that it is stored in.

    kind: its class, or an Auto class. may_lack: whether a tensor need not be there. options: of from_pretrained.
    Raises: ConfigError if it cannot be loaded, or tensors are missing: transformers would fill these with random ones.
    """
    options = {"dtype": "auto", "local_files_only": True, "output_loading_info": True, **options}
    try:
        model, found = kind.from_pretrained(where, **options)
    except Exception as error:  # transformers raises what the damage happens to lead to
        raise _not_loaded(where, "model", error) from error
    names = (*found["missing_keys"], *found["mismatched_keys"])
    filled = {name[0] if isinstance(name, tuple) else name for name in names}
    if lacking := sorted(name for name in filled if not may_lack(model, name)):
        raise ConfigError(
            f"{where} lacks {len(lacking)} of the tensors of a {type(model).__name__}, {lacking[0]} first. Restore its "
            "files, or export it again."
        )
    return model.eval()


def _not_loaded(where: Path, what: str, error: Exception) -> ConfigError:
    lines = str(error).strip().splitlines()
    why = lines[0] if lines else type(error).__name__
    return ConfigError(f"the {what} in {where} cannot be loaded ({why}). Restore its files, or export it again.")


def _from_checkpoint(where: Path, named: str | None) -> PrefixModel:
    trained = load_model(where)
    if trained.model.architecture != "ul2":
        raise ConfigError(
            f"{trained.folder} holds a BERT model, and only UL2 continues a text. BERT fills in masked words: export "
            "it (tools/export_hf.py RUN_OR_CHECKPOINT OUTPUT) for transformers' pipeline('fill-mask', model=OUTPUT). "
            "For tasks it is fine-tuned: tools/finetune.py."
        )
    return prefix_model_of(trained, needed_tokenizer(trained, named))


def prefix_model_of(trained: TrainedModel, tokenizer: Tokenizer) -> PrefixModel:
    """Return a UL2 model that has been loaded as the one to generate with, on the CPU."""
    model = to_hugging_face(trained.model, trained.weights, tokenizer)
    assert isinstance(model, LlamaForCausalLM)
    return PrefixModel(model, tokenizer_beside(trained.model, tokenizer))
