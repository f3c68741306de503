"""A trained model with its tokenizer and its run's settings, from a run, a checkpoint or an exported folder."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from raptr_ds.checkpoint.weights import TrainedModel
from raptr_ds.config.sections import ModelSection
from raptr_ds.data.manifest import TOKENIZER
from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.errors import ConfigError, DataError
from raptr_ds.hf.source import exported_kind, load_model, needed_tokenizer, read_run_data, run_folder, settings_of
from raptr_ds.paths.path import LayerPath
from raptr_ds.paths.raptr import residual_scale_of
from raptr_ds.user_paths import is_file


@dataclass(frozen=True)
class ModelSource:
    """A model to run at any depth.

    label: how tables and pictures name it. folder: of the run, or the exported folder: where its depth table lies.
    find_tokenizer: reads its tokenizer, or raises what `open_model` does. settings: the `raptr_ds` block of its run
    file; empty where that is not known.
    """

    label: str
    folder: Path
    trained: TrainedModel
    find_tokenizer: Callable[[], Tokenizer]
    settings: Mapping[str, Any]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.find_tokenizer()

    @property
    def num_layers(self) -> int:
        """Layers of the whole model."""
        return self.trained.model.num_layers

    @cached_property
    def digest(self) -> str:
        """Hexadecimal digest of the weights."""
        digest = hashlib.blake2b(digest_size=16)
        for name, weight in sorted(self.trained.weights.items()):
            digest.update(name.encode())
            digest.update(weight.numpy().data)
        return digest.hexdigest()

    def path(self, layers: tuple[int, ...]) -> LayerPath:
        """Return the path through some layers, with the residual scale that training gave paths of that length."""
        return LayerPath(layers, self.num_layers, residual_scale=self.residual_scale(len(layers)))

    def residual_scale(self, depth: int) -> float:
        """Return the factor on the branches of a path of `depth` layers: training's, if its paths skipped layers."""
        section = self.settings.get("path")
        section = section if isinstance(section, Mapping) else {}
        # Under `width` the scale is of heads, and all layers ran.
        rule = "none" if section.get("method") == "width" else str(section.get("residual_scale", "none"))
        return residual_scale_of(rule, depth, self.num_layers)


def open_model(where: Path, tokenizer: str | None = None) -> ModelSource:
    """Return the model of a run's newest checkpoint, of one checkpoint, or in a folder of tools/export_hf.py.

    tokenizer: a sentencepiece file, where the model's own is not to be found.
    Raises: ConfigError, DataError or CheckpointError for a folder that holds no such model, or no tokenizer.
    """
    is_exported = exported_kind(where) is not None
    source = _of_exported(where, tokenizer) if is_exported else source_of(load_model(where), tokenizer, where)
    assert source.tokenizer.vocab_size == source.trained.model.vocab_size
    return source


def labelled(sources: Sequence[ModelSource], paths: Sequence[Path]) -> list[ModelSource]:
    """Return models whose labels differ: where some share one, those have the paths that the user gave."""
    counts = Counter(source.label for source in sources)
    return [
        source if counts[source.label] == 1 else replace(source, label=str(path))
        for source, path in zip(sources, paths, strict=True)
    ]


def source_of(trained: TrainedModel, tokenizer: str | None, where: Path) -> ModelSource:
    """Return a run's or a checkpoint's model that has been loaded. where, tokenizer: as the user named them."""
    run = run_folder(trained.folder)
    is_one_of_many = where.resolve() == trained.folder.resolve()
    label = f"{run.resolve().name}, step {trained.step:,}" if is_one_of_many else run.resolve().name
    settings = settings_of(trained, read_run_data(trained.folder, needed=False))
    return ModelSource(label, run, trained, partial(needed_tokenizer, trained, tokenizer), settings)


def _of_exported(where: Path, named: str | None) -> ModelSource:
    try:
        from raptr_ds.hf.import_folder import read_exported
    except ImportError as error:
        raise ConfigError(
            f"{where} is a folder of transformers, which is not installed here ({error}). pip install "
            "'.[transformers]', or name the run that it was exported from."
        ) from error
    _, model, weights = read_exported(where)
    trained = TrainedModel(model, weights, 0, where)
    return ModelSource(where.resolve().name, where, trained, lambda: _exported_tokenizer(where, named, model), {})


def _exported_tokenizer(where: Path, named: str | None, model: ModelSection) -> Tokenizer:
    file = Path(named) if named else where / TOKENIZER
    if not named and not is_file(file):
        raise ConfigError(
            f"{where} has no {TOKENIZER}. Export the model with its tokenizer (tools/export_hf.py), or name that with "
            "--tokenizer FILE."
        )
    tokenizer = Tokenizer.load(file)
    if tokenizer.vocab_size != model.vocab_size:
        raise DataError(
            f"the tokenizer {file} has {tokenizer.vocab_size:,} entries, the model in {where} {model.vocab_size:,}: it "
            "is another model's. Name the model's own with --tokenizer FILE."
        )
    return tokenizer
