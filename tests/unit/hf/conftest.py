"""What the tests of export share: English prose that every Python has, and a tokenizer of each type trained on it."""

from pydoc_data.topics import topics

import pytest

from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.prepare.corpus import FileSource
from raptr_ds.prepare.readers import ReadingOptions
from raptr_ds.prepare.tokenizer_training import TokenizerSettings, train_tokenizer


@pytest.fixture(scope="session")
def prose() -> list[str]:
    """Python's help topics: the same for one version of Python."""
    return [topics[name] for name in sorted(topics)]


@pytest.fixture(scope="session", params=["bpe", "unigram"])
def tokenizer(request: pytest.FixtureRequest, prose: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer of the first thirty topics."""
    corpus = tmp_path_factory.mktemp("text") / "text.txt"
    corpus.write_text("\n".join(prose[:30]))
    settings = TokenizerSettings(vocab_size=700, num_sentinels=8, model_type=request.param)
    return train_tokenizer([FileSource(corpus, ReadingOptions())], settings)
