"""What a training step receives: micro batches of tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from raptr_ds.data.sample import PackedSample, Sample

PADDING = -1


@dataclass(frozen=True)
class Segments:
    """Where the examples of packed sequences lie. Attention stays within a segment, positions count from its start.

    Shapes: ids (b, T) int64, 0, 1, ... in each sequence, PADDING after the last example; positions (b, T) int64;
    in_prefix (b, T) bool, whether a position belongs to its example's prefix (bert: wherever there is an example).
    """

    ids: torch.Tensor
    positions: torch.Tensor
    in_prefix: torch.Tensor


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that go through the model together; all tensors are int64, made on the CPU.

    Shapes: tokens (b, T), padded at the end; positions (N,) places in the flattened b*T that are predicted, increasing;
    targets (N,) what they predict; prefix_lengths (b,) leading positions seen in both directions (bert: all real ones;
    packed: those of the first example); lengths (b,) real positions; sample_ids (b,) number of the sample in the run,
    which keys its dropout.
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
        """Return the micro batch on `device`, copied behind the host's back where that is a GPU."""
        return _to_device(self, device)


def _to_device(value: Any, device: torch.device) -> Any:
    """Return a tensor, or a dataclass of them, on `device`; anything else as it is."""
    if isinstance(value, torch.Tensor):
        if device.type != "cuda" or value.is_cuda:
            return value.to(device)
        return value.pin_memory().to(device, non_blocking=True)  # from pageable memory the host would wait
    if isinstance(value, MicroBatch | Segments):
        return type(value)(**{f.name: _to_device(getattr(value, f.name), device) for f in fields(value)})
    return value


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
        return StepBatch(tuple(micro.to(device) for micro in self.micro_batches))


def collate(
    samples: Sequence[Sample | PackedSample], sample_ids: Sequence[int], seq_length: int, pad_id: int
) -> MicroBatch:
    """Put samples into a micro batch; where one is packed, all are."""
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
