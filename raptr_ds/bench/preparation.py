"""Tokenizing and indexing a text: our preparation and Megatron's recipe, with the same tokenizer on one core.

Imported before megatron_stack.py, so nothing here imports megatron-core at once.
"""

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import sentencepiece
import torch

from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.errors import DataError
from raptr_ds.prepare.corpus import FileSource
from raptr_ds.prepare.index_writer import token_dtype
from raptr_ds.prepare.indexing import Preparation, PreparationSettings
from raptr_ds.prepare.readers import ReadingOptions, parse_row
from raptr_ds.user_paths import is_file


@dataclass
class PreparationTimes:
    """Seconds of each repetition, in turns, and the tokens that each makes of text_bytes."""

    text_bytes: int
    ours: list[float] = field(default_factory=list)
    megatron: list[float] = field(default_factory=list)
    our_tokens: int = 0
    megatron_tokens: int = 0


def check_text(text: Path) -> None:
    """Check that every line of a file is a JSON object with a text. Raises: DataError."""
    if not is_file(text):
        raise DataError(f'{text} does not exist or is not a file. Name a JSONL file with a "text" in each line.')
    number = 0
    with text.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            row = parse_row(line)
            if isinstance(row, str):
                raise DataError(f"{text}, line {number}: {row}. Correct or remove it.")
            if not isinstance(row.get("text"), str):
                raise DataError(f'{text}, line {number} has no "text". Correct or remove it.')
    if not number:
        raise DataError(f'{text} is empty. Name a JSONL file with a "text" in each line.')


def measure_preparation(
    text: Path, tokenizer_path: Path, repetitions: int, clock: Callable[[], float]
) -> PreparationTimes:
    """Prepare the JSONL file `text` both ways, `repetitions` times. Ours also splits off validation and verifies."""
    tokenizer = Tokenizer.load(tokenizer_path)
    times = PreparationTimes(text.stat().st_size)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with text.open(encoding="utf-8") as lines:
            (folder / "head.jsonl").write_text(next(lines), encoding="utf-8")
        encode_and_index(folder / "head.jsonl", tokenizer, folder / "head")  # its imports are not counted
        for number in range(repetitions):
            prefix = folder / f"megatron-{number}"
            seconds, times.megatron_tokens = _timed(clock, lambda p=prefix: encode_and_index(text, tokenizer, p))
            times.megatron.append(seconds)
            output = folder / f"ours-{number}"
            settings = PreparationSettings(tokenizer_path=str(tokenizer_path))
            source = FileSource(text, ReadingOptions())
            preparation = Preparation([source], output, settings, report=lambda line: None)
            seconds, times.our_tokens = _timed(
                clock, lambda p=preparation: sum(split.tokens for split in p.run().splits.values())
            )
            times.ours.append(seconds)
            shutil.rmtree(output)
    return times


def _timed(clock: Callable[[], float], action: Callable[[], int]) -> tuple[float, int]:
    start = clock()
    result = action()
    return clock() - start, result


def encode_and_index(text: Path, tokenizer: Tokenizer, prefix: Path) -> int:
    """Write PREFIX.bin and .idx of the JSONL file `text` and return the number of tokens.

    As Megatron-LM's tools/preprocess_data.py in one process: each line's text is encoded by sentencepiece, followed by
    the end of the document, and given to megatron-core's builder.
    """
    # Seven seconds of imports that a training run does not need.
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    dtype = np.uint16 if token_dtype(tokenizer.vocab_size) == np.uint16 else np.int32
    builder = IndexedDatasetBuilder(str(prefix.with_suffix(".bin")), dtype=dtype)
    processor, total = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model), 0
    with text.open(encoding="utf-8") as lines:
        for line in lines:
            ids = processor.encode(json.loads(line)["text"])
            ids.append(tokenizer.eos_id)
            builder.add_document(torch.tensor(ids, dtype=torch.int64), [len(ids)])
            total += len(ids)
    builder.finalize(str(prefix.with_suffix(".idx")))
    return total
