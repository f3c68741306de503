"""The model that is fine-tuned: an exported folder, or a run or checkpoint of a BERT, exported for this."""

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from raptr_ds.errors import ConfigError
from raptr_ds.finetuning import heads as _heads  # noqa: F401 - makes the Auto classes know ours
from raptr_ds.finetuning.task import Kind, Task
from raptr_ds.hf.export import export
from raptr_ds.hf.load import check_size, exported_config, exported_tokenizer, load_exported, refuse_tokenizer
from raptr_ds.hf.source import exported_kind

_CLASSES = {
    "classification": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
    "multiple-choice": AutoModelForMultipleChoice,
    "question-answering": AutoModelForQuestionAnswering,
}
_NEW_IN_BASE = ("pooler", "contact_head")  # of an encoder's tensors, those that pretraining does not have
_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")
_UL2 = (
    "is a UL2 model, which continues texts: there is no classifier of it. tools/evaluate.py measures it as it is; "
    "fine-tune a BERT."
)


@dataclass(frozen=True)
class Encoder:
    """A folder of transformers with an encoder. name: as the user named it; digest: of its weights."""

    name: str
    folder: Path
    tokenizer: PreTrainedTokenizerFast
    config: PreTrainedConfig
    digest: str

    @property
    def max_length(self) -> int:
        """The most tokens that the model takes."""
        longest = [self.tokenizer.model_max_length, getattr(self.config, "max_position_embeddings", None)]
        return min(value for value in longest if value)


@contextmanager
def open_encoder(where: Path, tokenizer: str | None = None) -> Iterator[Encoder]:
    """Yield the encoder in an exported folder, of a run's newest checkpoint, or of one checkpoint.

    tokenizer: a sentencepiece file, where a run's or a checkpoint's own is not to be found.
    Raises: ConfigError, DataError or CheckpointError for a folder that holds none, or no tokenizer.
    """
    if exported_kind(where) is not None:
        refuse_tokenizer(where, tokenizer)
        yield exported_encoder(where)
        return
    with tempfile.TemporaryDirectory(prefix="raptr_ds_") as temporary:
        folder = Path(temporary) / "model"
        done = export(where, folder, torch.float32, tokenizer)
        if not done.has_tokenizer:
            raise ConfigError(
                f"{done.folder} has no tokenizer: it lies outside of its run's folder. Name it with --tokenizer FILE."
            )
        yield exported_encoder(folder, str(done.folder))


def exported_encoder(folder: Path, name: str | None = None) -> Encoder:
    """Return the encoder in a folder of transformers. Raises: as `open_encoder` does."""
    config = exported_config(folder)
    if isinstance(config, LlamaConfig):
        raise ConfigError(f"{name or folder} {_UL2}")
    tokenizer = exported_tokenizer(folder)
    check_size(folder, tokenizer, config)
    digest = hashlib.blake2b(digest_size=16)
    files = sorted(path for ending in ("safetensors", "bin") for path in folder.glob(f"*.{ending}"))
    for path in files:
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return Encoder(name or str(folder), folder, tokenizer, config, digest.hexdigest())


def check_can_do(encoder: Encoder, kind: Kind) -> None:
    """Raise ConfigError if there is no class for such a task on this model."""
    try:
        with torch.device("meta"):
            _CLASSES[kind].from_config(encoder.config)
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{encoder.name} is a {encoder.config.model_type} model, for which transformers has no class for "
            f"{kind.replace('-', ' ')}. Use a MegatronBert or ESM model of tools/export_hf.py."
        ) from error


def _is_new(model: PreTrainedModel, name: str) -> bool:
    """Return whether a tensor is one that pretraining does not have: of the head, or some of the encoder's."""
    return not name.startswith(f"{model.base_model_prefix}.") or any(part in name for part in _NEW_IN_BASE)


def load_for(task: Task, labels: tuple[str, ...], encoder: Encoder, dropout: float | None) -> PreTrainedModel:
    """Return the encoder with a head for the task, in fp32; what is new in it is drawn from torch's generator.

    labels: names of the classes. dropout: of the hidden states and of attention; None keeps the model's.
    Raises: ConfigError if the folder cannot be loaded, or tensors of the encoder are missing.
    """
    config = exported_config(encoder.folder)
    config.problem_type = None
    if task.kind in ("classification", "regression"):
        names = labels or ("score",)
        config.id2label = dict(enumerate(names))
        config.label2id = {name: index for index, name in enumerate(names)}
        config.problem_type = "single_label_classification" if labels else "regression"
    else:
        config.num_labels = 2  # QA: where the answer begins and ends; a choice's score does not look at it
    for name in _DROPOUTS if dropout is not None else ():
        setattr(config, name, dropout)
    model: Any = load_exported(
        encoder.folder,
        _CLASSES[task.kind],
        _is_new,
        config=config,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,  # the head of another task
    )
    # Trainer takes a forward pass with **kwargs for one that divides its loss by all sequences of a step. These take
    # the mean of what they are given: without this the losses of accumulated batches and of processes are added up.
    model.accepts_loss_kwargs = False
    # transformers 5.24 writes ESM's norms by their old names (gamma, beta). Trainer loads the best checkpoint, and one
    # to go on from, by the model's own names, and leaves out what it does not find: these norms.
    model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
    return model
