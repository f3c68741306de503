"""From samples to what a training step receives: micro batches of tensors, on the CPU or a device."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

import numpy as np
import torch
from torch.utils import _pytree as pytree

PADDING = -1
ALIGNMENT = 16
"""Bytes; the alignment of a tensor's address that the widest load of a GPU kernel needs."""


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


@dataclass(frozen=True)
class Segments:
    """Where the examples of packed sequences are. Attention stays within a segment, positions count from its start.

    Shapes: ids (b, T) int64, 0, 1, ... in each sequence, PADDING after the last example; positions (b, T) int64;
    in_prefix (b, T) bool, whether a position belongs to its example's prefix (bert: wherever there is an example).
    """

    ids: torch.Tensor
    positions: torch.Tensor
    in_prefix: torch.Tensor


class Movable:
    """A tree of tensors (torch.utils._pytree)."""

    def to(self, device: torch.device) -> Self:
        """Return the same on `device`: on a GPU as views of one buffer, filled by a single copy that nothing waits for.

        The copy is made from pinned memory: from any other the host would wait for the device.
        """
        leaves, structure = pytree.tree_flatten(self)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if device.type == "cuda" and not any(tensor.is_cuda for tensor in tensors):
            moved = iter(unpacked(packed(tensors, pin_memory=True).to(device, non_blocking=True), tensors))
        else:
            moved = (tensor.to(device) for tensor in tensors)
        leaves = [next(moved) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        return pytree.tree_unflatten(leaves, structure)


@dataclass(frozen=True)
class MicroBatch(Movable):
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


@dataclass(frozen=True)
class StepBatch(Movable):
    """The micro batches of one step on one data-parallel rank, in the order of accumulation."""

    micro_batches: tuple[MicroBatch, ...]

    @property
    def num_predictions(self) -> int:
        """Predicted positions in all micro batches."""
        return sum(micro.num_predictions for micro in self.micro_batches)


for _part in (Segments, MicroBatch, StepBatch):
    pytree.register_dataclass(_part)


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
    shape = len(samples), seq_length
    tokens, ids = np.full(shape, pad_id, np.int64), np.full(shape, PADDING, np.int64)
    places, in_prefix = np.zeros(shape, np.int64), np.zeros(shape, bool)
    positions, targets, lengths = [], [], []
    for row, parts in enumerate(rows):
        start = 0
        for number, part in enumerate(parts):
            end = start + len(part.tokens)
            tokens[row, start:end] = part.tokens
            ids[row, start:end] = number
            places[row, start:end] = np.arange(end - start)
            in_prefix[row, start : start + part.prefix_length] = True
            positions.append(row * seq_length + start + part.positions)
            targets.append(part.targets)
            start = end
        lengths.append(start)
    segments = Segments(*map(torch.from_numpy, (ids, places, in_prefix)))
    return MicroBatch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(np.concatenate(positions)),
        targets=torch.from_numpy(np.concatenate(targets)),
        prefix_lengths=torch.tensor([parts[0].prefix_length for parts in rows], dtype=torch.int64),
        lengths=torch.tensor(lengths, dtype=torch.int64),
        sample_ids=torch.tensor(sample_ids, dtype=torch.int64),
        is_full=all(length == seq_length for length in lengths),
        segments=segments if is_packed else None,
    )
