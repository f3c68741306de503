"""Tokenizing and indexing: our preparation of a text beside megatron's recipe, with the same tokenizer on one core."""

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from raptr_ds.data.corpus import FileSource
from raptr_ds.data.indexing import Preparation, PreparationSettings
from raptr_ds.data.megatron_recipe import encode_and_index
from raptr_ds.data.readers import ReadingOptions
from raptr_ds.data.tokenizer import Tokenizer

_CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class PreparationTimes:
    """Seconds of each repetition, in turns; tokens that each made of text_bytes."""

    text_bytes: int
    ours: list[float] = field(default_factory=list)
    megatron: list[float] = field(default_factory=list)
    our_tokens: int = 0
    megatron_tokens: int = 0


def measure_preparation(text: Path, tokenizer_path: Path, repetitions: int, clock: str) -> PreparationTimes:
    """Prepare the JSONL file `text` both ways, `repetitions` times. Ours also splits validation off and verifies."""
    tokenizer = Tokenizer.load(tokenizer_path)
    times = PreparationTimes(text.stat().st_size)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        encode_and_index(_head(text, folder / "head.jsonl"), tokenizer, folder / "head")  # its imports are not counted
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


def _timed(clock: str, action: Callable[[], int]) -> tuple[float, int]:
    start = _CLOCKS[clock]()
    result = action()
    return _CLOCKS[clock]() - start, result


def _head(text: Path, output: Path) -> Path:
    with text.open(encoding="utf-8") as lines:
        output.write_text(next(lines), encoding="utf-8")
    return output
