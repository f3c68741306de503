"""What a run or a checkpoint holds: its model, its tokenizer, and what the run's files have about it.

transformers, which is optional, is imported for its tokenizer alone.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raptr_ds.checkpoint.folder import CHECKPOINTS, checkpoints_at
from raptr_ds.checkpoint.manifest import DamagedCheckpointError
from raptr_ds.checkpoint.weights import TrainedModel, load_trained_model
from raptr_ds.config.sections import ModelSection
from raptr_ds.data.loader import folders_of
from raptr_ds.data.manifest import TOKENIZER
from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.errors import CheckpointError, ConfigError, DataError
from raptr_ds.json_text import parse_json
from raptr_ds.runtime.identity import IDENTITY, tokenizer_digest_in
from raptr_ds.user_paths import is_file, is_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WITHOUT = "none"
"""What stands for no tokenizer where one can be named."""


@dataclass(frozen=True)
class RunData:
    """A run's config.json, and what it names. folders: the prepared ones; tokenizer: its file."""

    config: dict[str, Any]
    folders: tuple[Path, ...]
    tokenizer: Path


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


def exported_kind(where: Path) -> str | None:
    """Return the class that an exported folder names, None for another folder. Raises: ConfigError if there is none."""
    if not is_folder(where):
        raise ConfigError(f"{where}: there is no such folder. Name an exported model, a run or a checkpoint.")
    config = where / "config.json"
    if not is_file(config):
        return None
    try:
        content = parse_json(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{config} cannot be read ({error}). Export the model again, or restore the file.") from error
    if not isinstance(content, dict) or "model_type" not in content:
        return None
    kinds = content.get("architectures")
    return str(kinds[0]) if isinstance(kinds, list) and kinds else str(content["model_type"])


def run_folder(checkpoint: Path) -> Path:
    """Return the folder of the run that a checkpoint lies in, if it lies in one."""
    folder = checkpoint.absolute().parent
    return folder.parent if folder.name == CHECKPOINTS else folder


def run_data_of(config: dict[str, Any]) -> RunData:
    """Return the data of a run with this complete run file. Raises: LookupError, TypeError, ... if it names none."""
    content = config["raptr_ds"]["data"]
    folders = tuple(map(Path, folders_of(content["path"])))
    return RunData(config, folders, Path(content.get("tokenizer") or folders[0] / TOKENIZER))


def read_run_data(checkpoint: Path, needed: bool) -> RunData | None:
    """Return the data of the run that a checkpoint lies in; None without the run's config.json.

    Raises: ConfigError if config.json cannot be read or does not name the data, and these are needed.
    """
    config = run_folder(checkpoint) / "config.json"
    try:
        return run_data_of(parse_json(config.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        if not needed:
            return None
        if isinstance(error, OSError):
            raise ConfigError(f"cannot read {config}: {error.strerror or error}. Check its permissions.") from error
        raise ConfigError(
            f"{config} is damaged, or not the configuration of a run: raptr_ds.data.path, which leads to the "
            f"tokenizer, cannot be read ({type(error).__name__}: {error}). Restore it, or move it away and name the "
            "tokenizer with --tokenizer FILE."
        ) from error


def settings_of(trained: TrainedModel, data: RunData | None) -> dict[str, Any]:
    """Return the `raptr_ds` block of the run file that a checkpoint or its run's folder has; empty without one."""
    recorded = trained.run_state.get(IDENTITY) or {}
    block = (recorded.get("config") or (data.config if data else {})).get("raptr_ds")
    return block if isinstance(block, dict) else {}


def needed_tokenizer(trained: TrainedModel, named: str | None) -> Tokenizer:
    """Return the tokenizer of a model. named: its file, where it is not to be found in the run's folder.

    Raises: ConfigError if it is not to be found; DataError as `load_tokenizer` does.
    """
    data = read_run_data(trained.folder, needed=named is None)
    found = load_tokenizer(named, data, trained, instead="")
    if found is None:
        raise ConfigError(
            f"{trained.folder} has no tokenizer: it lies outside of its run's folder. Name it with --tokenizer FILE."
        )
    return found


def load_tokenizer(
    named: str | None,
    data: RunData | None,
    trained: TrainedModel,
    instead: str = f", or export the weights without it by --tokenizer {WITHOUT}",
) -> Tokenizer | None:
    """Return the tokenizer that the user or the run names, None if neither does. instead: what errors propose, too.

    Raises: DataError if it cannot be read, or is not the one that the model was trained with; of a checkpoint that
    does not record its tokenizer, the size alone is known.
    """
    path = Path(named) if named else data and data.tokenizer
    if named == WITHOUT or path is None:
        return None
    if not named and not os.access(path, os.R_OK):
        raise DataError(
            f"the tokenizer {path}, which the run's config.json leads to, is not there or cannot be read. Name it with "
            f"--tokenizer FILE{instead}."
        )
    tokenizer = Tokenizer.load(path)
    recorded = tokenizer_digest_in(trained.run_state)
    if tokenizer.vocab_size != trained.model.vocab_size:
        difference = f"it has {tokenizer.vocab_size} entries, the model {trained.model.vocab_size}"
    elif recorded not in (None, tokenizer.digest):
        difference = f"its digest is {tokenizer.digest}, and {trained.folder} records {recorded}"
    else:
        return tokenizer
    raise DataError(
        f"the tokenizer {path} is not the one that the model was trained with: {difference}. Name that one with "
        f"--tokenizer FILE{instead}."
    )


def tokenizer_beside(model: ModelSection, tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Return the tokenizer as transformers has it beside this model."""
    from raptr_ds.hf.tokenizer import tokenizer_to_hugging_face

    has_token_types = model.position_embedding == "learned"  # as MegatronBert, unlike ESM
    return tokenizer_to_hugging_face(tokenizer, model.architecture, model.seq_length, has_token_types)
