"""Megatron's preparation of data, as its own tool goes about it, for the benchmark to compare ours with."""

import json
from pathlib import Path

import numpy as np
import sentencepiece
import torch

from raptr_ds.data.indexed import token_dtype
from raptr_ds.data.tokenizer import Tokenizer


def encode_and_index(text: Path, tokenizer: Tokenizer, prefix: Path) -> int:
    """Write PREFIX.bin and .idx of the JSONL file `text` and return the number of tokens.

    Each line is parsed, its text encoded by sentencepiece as it stands, the end of the document appended, and the
    result given to megatron-core's builder (Megatron-LM, tools/preprocess_data.py, in one process).
    """
    # Seven seconds of imports that a training run does not need.
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(prefix.with_suffix(".bin")), dtype=_type(tokenizer.vocab_size))
    processor, total = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model), 0
    with text.open(encoding="utf-8") as lines:
        for line in lines:
            ids = processor.encode(json.loads(line)["text"])
            ids.append(tokenizer.eos_id)
            builder.add_document(torch.tensor(ids, dtype=torch.int64), [len(ids)])
            total += len(ids)
    builder.finalize(str(prefix.with_suffix(".idx")))
    return total


def _type(vocab_size: int) -> type[np.number]:
    return np.uint16 if token_dtype(vocab_size) == np.uint16 else np.int32
