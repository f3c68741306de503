"""From samples to what a training step receives: packing, and micro batches of tensors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import torch

PADDING = -1
ALIGNMENT = 16
"""Bytes; the alignment of a tensor's address that the widest load of a GPU kernel needs."""


SMALLEST_TEXT = 2  # tokens; an objective hides at least one and keeps at least one


@dataclass(frozen=True)
class Sample:
    """Tokens and what is predicted from them.

    Shapes: tokens (length,) int64, length <= seq_length; positions (n,) int64, increasing, where the model predicts;
    targets (n,) int64, what it should predict there. prefix_length: leading positions seen in both directions.
    """

    tokens: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    prefix_length: int


@dataclass(frozen=True)
class PackedSample:
    """Several samples in one sequence, one after the other; none sees another. At least one."""

    parts: tuple[Sample, ...]


class PackableObjective(Protocol):
    """An objective that can make samples shorter than a sequence."""

    window: int
    smallest_room: int
    """Most tokens that a sample of SMALLEST_TEXT tokens takes."""

    def sample(self, text: np.ndarray, rng: np.random.Generator, room: int | None = None) -> Sample:
        """Corrupt `text`, or as much of it as gives a sample of at most `room` tokens."""
        ...


class PackedDocuments:
    """Makes packed samples: the documents of a window, in order, each corrupted by itself, until the sequence is full.

    Of a document that the window cuts, the part inside counts. What no longer fits is left out, and so are documents of
    a single token. If there are no longer ones, the window is one example.
    """

    def __init__(self, objective: PackableObjective, seq_length: int, end_id: int) -> None:
        """Pack samples of `objective`; end_id: the token that ends each document."""
        self.window = objective.window
        self._objective, self._seq_length, self._end_id = objective, seq_length, end_id

    def sample(self, text: np.ndarray, rng: np.random.Generator) -> PackedSample:
        """Make the examples of `text` (at most `window` tokens, int64)."""
        ends = np.flatnonzero(text == self._end_id) + 1
        documents = [part for part in np.split(text, ends) if len(part) >= SMALLEST_TEXT] or [text]
        parts: list[Sample] = []
        room = self._seq_length
        for document in documents:
            if room < self._objective.smallest_room:
                break
            parts.append(self._objective.sample(document, rng, room))
            room -= len(parts[-1].tokens)
        return PackedSample(tuple(parts))


@dataclass(frozen=True)
class Segments:
    """Where the examples of packed sequences are. Attention stays within a segment, positions count from its start.

    Shapes: ids (b, T) int64, 0, 1, ... in each sequence, PADDING after the last example; positions (b, T) int64;
    in_prefix (b, T) bool, whether a position belongs to its example's prefix (bert: wherever there is an example).
    """

    ids: torch.Tensor
    positions: torch.Tensor
    in_prefix: torch.Tensor


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that go through the model together; all tensors are int64, made on the CPU.

    Shapes: tokens (b, T), padded at the end; positions (N,) where the model predicts, in the flattened b*T, increasing;
    targets (N,) what it should predict there; prefix_lengths (b,) leading positions seen in both directions (bert: all
    that are not padding; packed: those of the first example); lengths (b,) positions that are not padding; sample_ids
    (b,) number of the sample in the run, which keys its dropout.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    prefix_lengths: torch.Tensor
    lengths: torch.Tensor
    sample_ids: torch.Tensor
    is_full: bool
    """Whether no position is padding; known on the host, so that asking costs no synchronization with a device."""
    segments: Segments | None = None
    """The examples of packed sequences; None where each sequence is one example."""

    @property
    def num_predictions(self) -> int:
        """Number of predicted positions N."""
        return self.targets.shape[0]

    def to(self, device: torch.device) -> "MicroBatch":
        """Return the micro batch on `device`; the copy to a GPU is asynchronous."""
        return _to_device((self,), device)[0]


@dataclass(frozen=True)
class StepBatch:
    """The micro batches of one step on one data-parallel rank, in the order of accumulation."""

    micro_batches: tuple[MicroBatch, ...]

    @property
    def num_predictions(self) -> int:
        """Predicted positions in all micro batches."""
        return sum(micro.num_predictions for micro in self.micro_batches)

    def to(self, device: torch.device) -> "StepBatch":
        """Return the batch on `device`."""
        return StepBatch(_to_device(self.micro_batches, device))


def _to_device(micro_batches: Sequence[MicroBatch], device: torch.device) -> tuple[MicroBatch, ...]:
    """Return micro batches on `device`; on a GPU as views of one buffer, filled by a single copy.

    The copy is made from pinned memory: from any other the host would wait for the device.
    """
    tensors = [tensor for micro in micro_batches for tensor in _tensors_of(micro)]
    if device.type == "cuda" and not any(tensor.is_cuda for tensor in tensors):
        moved = unpacked(packed(tensors, pin_memory=True).to(device, non_blocking=True), tensors)
    else:
        moved = [tensor.to(device) for tensor in tensors]
    following = iter(moved)
    return tuple(_with_tensors(micro, following) for micro in micro_batches)


def _tensors_of(value: MicroBatch | Segments) -> Iterator[torch.Tensor]:
    for field in fields(value):
        part = getattr(value, field.name)
        if isinstance(part, torch.Tensor):
            yield part
        elif isinstance(part, Segments):
            yield from _tensors_of(part)


def _with_tensors(value: Any, following: Iterator[torch.Tensor]) -> Any:
    """Return a copy of `value` with the following tensors, in the order of _tensors_of."""
    changes: dict[str, Any] = {}
    for field in fields(value):
        part = getattr(value, field.name)
        if isinstance(part, torch.Tensor):
            changes[field.name] = next(following)
        elif isinstance(part, Segments):
            changes[field.name] = _with_tensors(part, following)
    return replace(value, **changes)


def packed(tensors: Sequence[torch.Tensor], pin_memory: bool) -> torch.Tensor:
    """Return the tensors' bytes in one buffer on the host, each at a multiple of ALIGNMENT."""
    buffer = torch.empty(_starts(tensors)[-1], dtype=torch.uint8, pin_memory=pin_memory)
    for view, tensor in zip(unpacked(buffer, tensors), tensors, strict=True):
        view.copy_(tensor)
    return buffer


def unpacked(buffer: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return views of a packed buffer, with the types and shapes of `like`."""
    starts = _starts(like)[:-1]
    return [
        buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for start, tensor in zip(starts, like, strict=True)
    ]


def _starts(tensors: Sequence[torch.Tensor]) -> list[int]:
    sizes = (-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors)
    return list(accumulate(sizes, initial=0))


def collate(
    samples: Sequence[Sample | PackedSample], sample_ids: Sequence[int], seq_length: int, pad_id: int
) -> MicroBatch:
    """Put samples into a micro batch; all of them are packed, or none is."""
    rows = [sample.parts if isinstance(sample, PackedSample) else (sample,) for sample in samples]
    is_packed = any(isinstance(sample, PackedSample) for sample in samples)
    tokens = np.full((len(samples), seq_length), pad_id, np.int64)
    positions, targets, lengths = [], [], []
    for row, parts in enumerate(rows):
        start = 0
        for part in parts:
            tokens[row, start : start + len(part.tokens)] = part.tokens
            positions.append(row * seq_length + start + part.positions)
            targets.append(part.targets)
            start += len(part.tokens)
        lengths.append(start)
    return MicroBatch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(np.concatenate(positions)),
        targets=torch.from_numpy(np.concatenate(targets)),
        prefix_lengths=torch.tensor([parts[0].prefix_length for parts in rows], dtype=torch.int64),
        lengths=torch.tensor(lengths, dtype=torch.int64),
        sample_ids=torch.tensor(sample_ids, dtype=torch.int64),
        is_full=all(length == seq_length for length in lengths),
        segments=_segments(rows, seq_length) if is_packed else None,
    )


def _segments(rows: Sequence[Sequence[Sample]], seq_length: int) -> Segments:
    ids = np.full((len(rows), seq_length), PADDING, np.int64)
    positions = np.zeros((len(rows), seq_length), np.int64)
    in_prefix = np.zeros((len(rows), seq_length), bool)
    for row, parts in enumerate(rows):
        start = 0
        for number, part in enumerate(parts):
            end = start + len(part.tokens)
            ids[row, start:end] = number
            positions[row, start:end] = np.arange(end - start)
            in_prefix[row, start : start + part.prefix_length] = True
            start = end
    return Segments(torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(in_prefix))
