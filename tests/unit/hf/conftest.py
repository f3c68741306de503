"""What the tests of export share: English prose that every Python has, and tokenizers trained on it."""

from functools import partial
from pydoc_data.topics import topics

import pytest

from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.prepare.tokenizer_training import TokenizerSettings, train_tokenizer
from tests.exported_runs import Tool
from tests.foreign_models import FOREIGN, brought, foreign_model
from tests.made_up_text import TextSource


@pytest.fixture(scope="session")
def prose() -> list[str]:
    """Python's help topics: the same for one version of Python."""
    return [topics[name] for name in sorted(topics)]


@pytest.fixture(scope="session", params=["bpe", "unigram", "t5", "llama"])
def tokenizer(request: pytest.FixtureRequest, prose: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer of the first thirty topics: of a type that prepare trains, or as another project trains it."""
    kind, text = request.param, "\n".join(prose[:30])
    if kind in FOREIGN:
        model = foreign_model({**FOREIGN[kind], "vocab_size": 700}, text.split("\n"))
        return brought(model, tmp_path_factory.mktemp("model"))
    return train_tokenizer([TextSource([text])], TokenizerSettings(vocab_size=700, num_sentinels=8, model_type=kind))


@pytest.fixture
def export(tool: Tool) -> Tool:
    """Runs tools/export_hf.py."""
    return partial(tool, "export_hf.py")
