"""Packing: every document of a window is an example, nothing is cut that fits, and all of it is a pure function."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from raptr_ds.data.batch import PADDING
from raptr_ds.data.loader import Loader, build_loader
from raptr_ds.data.masked_lm import MaskedLM
from raptr_ds.data.packed_documents import PackedDocuments
from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.prepare.indexing import Preparation, PreparationSettings
from tests.made_up_text import TextSource, made_up_text

SEQ_LENGTH = 96


@pytest.fixture(scope="module")
def short_documents(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of documents of which several fill a sequence."""
    output = tmp_path_factory.mktemp("short") / "folder"
    texts = [made_up_text(number, 1)[: 20 + 3 * (number % 40)] for number in range(300)]
    settings = PreparationSettings(tokenizer_path=str(data_folder / "tokenizer.model"))
    Preparation([TextSource(texts)], output, settings, report=lambda line: None).run()
    return output


def loader(folder: Path, architecture: str, micro: int = 6, data_parallel: int = 1, **run: Any) -> Loader:
    data = SimpleNamespace(path=str(folder), tokenizer=None, packing=True, num_workers=0, prefetch=2)
    objective = SimpleNamespace(mask_rate=0.15, whole_word=False, denoisers="ul2")
    model = SimpleNamespace(architecture=architecture, seq_length=SEQ_LENGTH, vocab_size=0)
    accumulation = 12 // (micro * data_parallel)
    batch = SimpleNamespace(global_batch=12, micro_batch=micro, accumulation=accumulation, data_parallel=data_parallel)
    return build_loader(data, objective, model, batch, **{"seed": 1, "dp_rank": 0, **run})


@pytest.mark.parametrize("architecture", ["bert", "ul2"])
def test_segments_are_whole_examples(short_documents: Path, tokenizer: Tokenizer, architecture: str) -> None:
    counts = []
    for batch in loader(short_documents, architecture).at(2).micro_batches:
        segments = batch.segments
        assert segments is not None
        real = segments.ids != PADDING
        assert torch.equal(real, torch.arange(SEQ_LENGTH) < batch.lengths[:, None])
        assert torch.equal(batch.tokens == tokenizer.pad_id, ~real)
        counts += (segments.ids.max(1).values + 1).tolist()
        starts = (segments.positions == 0) & real
        assert torch.equal(starts.cumsum(1)[real] - 1, segments.ids[real])
        first = batch.tokens[starts]
        if architecture == "bert":
            assert (first == tokenizer.cls_id).all()
            assert torch.equal(segments.in_prefix, real)
        else:
            assert set(first.tolist()) <= set(tokenizer.mode_ids.values())
            # Each target is the next token of the same example, beyond its prefix.
            flat = batch.positions
            assert torch.equal(batch.tokens.flatten()[flat + 1], batch.targets)
            assert torch.equal(segments.ids.flatten()[flat], segments.ids.flatten()[flat + 1])
            assert not segments.in_prefix.flatten()[flat + 1].any()
    assert np.mean(counts) > 2


@pytest.mark.parametrize("architecture", ["bert", "ul2"])
def test_packed_batches_are_pure_functions_of_step_and_place(short_documents: Path, architecture: str) -> None:
    (whole,) = loader(short_documents, architecture, micro=12).at(3).micro_batches
    for rank in range(2):
        parts = loader(short_documents, architecture, micro=3, data_parallel=2, dp_rank=rank).at(3).micro_batches
        for part in parts:
            rows = part.sample_ids - 36
            assert torch.equal(part.tokens, whole.tokens[rows])
            assert part.segments is not None
            assert whole.segments is not None
            for name in ("ids", "positions", "in_prefix"):
                assert torch.equal(getattr(part.segments, name), getattr(whole.segments, name)[rows])
    again = loader(short_documents, architecture, micro=12)
    assert torch.equal(again.at(3).micro_batches[0].tokens, whole.tokens)
    assert not torch.equal(again.at(4).micro_batches[0].tokens, whole.tokens)


def test_documents_fill_a_sequence_in_order(tokenizer: Tokenizer) -> None:
    letters = tokenizer.text_ids[:80]
    end = np.array([tokenizer.eos_id])
    documents = [letters[:5], letters[5:6], letters[6:26], letters[26:80]]
    window = np.concatenate([*(np.concatenate([d, end]) for d in documents[:3]), documents[3]])
    maker = PackedDocuments(MaskedLM(tokenizer, 64, 0.01, whole_word=False), 64, tokenizer.eos_id)
    packed = maker.sample(window[1:], np.random.default_rng(0))
    assert [len(part.tokens) - 2 for part in packed.parts] == [5, 2, 21, 64 - 8 - 4 - 24]  # the last is cut
    alone = maker.sample(np.concatenate([end, end, end]), np.random.default_rng(0))
    assert len(alone.parts) == 1  # nothing but ends of documents: one example, as without packing
