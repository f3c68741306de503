"""Whether the checkpoints of a run can be exported, before there are any."""

import json
import sys
from pathlib import Path

from raptr_ds.checkpoint.weights import TrainedModel
from raptr_ds.config.sections import ModelSection
from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.errors import ConfigError
from raptr_ds.hf.source import run_data_of, tokenizer_beside
from raptr_ds.hf.tokenizer import SAMPLE_TEXTS, check_same_ids
from raptr_ds.hf.twins import twin_of

STANDARD_INPUT = Path("-")


def check_exportable(file: Path) -> None:
    """Check a run's config.json, with its vocabulary in it, for a model and a tokenizer that transformers has.

    file: `-` for standard input. Raises: ConfigError or DataError for what stands in the way.
    """
    try:
        text = sys.stdin.read() if file == STANDARD_INPUT else file.read_text(encoding="utf-8")
        config = json.loads(text)
        model, data = ModelSection(**config["raptr_ds"]["model"]), run_data_of(config)
    except (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{file} is not the config.json of a run ({type(error).__name__}: {error}).") from error
    twin_of(model)
    tokenizer = Tokenizer.load(data.tokenizer)
    check_same_ids(tokenizer, tokenizer_beside(TrainedModel(model, {}, 0, Path()), tokenizer), SAMPLE_TEXTS)
