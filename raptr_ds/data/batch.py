"""What a training step receives: micro batches of tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from raptr_ds.data.sample import Sample


@dataclass(frozen=True)
class MicroBatch:
    """Sequences that go through the model together; all tensors are int64, made on the CPU.

    Shapes: tokens (b, T), padded at the end; positions (N,) places in the flattened b*T that are predicted, increasing;
    targets (N,) what they predict; prefix_lengths (b,) leading positions seen in both directions (bert: all real ones);
    lengths (b,) real positions; sample_ids (b,) number of the sample in the run, which keys its dropout.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    prefix_lengths: torch.Tensor
    lengths: torch.Tensor
    sample_ids: torch.Tensor
    is_full: bool
    """Whether no position is padding; known on the host, so that asking costs no synchronization with a device."""

    @property
    def num_predictions(self) -> int:
        """Number of predicted positions N."""
        return self.targets.shape[0]

    def to(self, device: torch.device) -> "MicroBatch":
        """Return the micro batch on `device`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {k: v.to(device, non_blocking=True) for k, v in values.items() if isinstance(v, torch.Tensor)}
        return MicroBatch(**{**values, **tensors})


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


def collate(samples: Sequence[Sample], sample_ids: Sequence[int], seq_length: int, pad_id: int) -> MicroBatch:
    """Put samples into a micro batch."""
    tokens = np.full((len(samples), seq_length), pad_id, np.int64)
    for row, sample in enumerate(samples):
        tokens[row, : len(sample.tokens)] = sample.tokens
    return MicroBatch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(np.concatenate([row * seq_length + s.positions for row, s in enumerate(samples)])),
        targets=torch.from_numpy(np.concatenate([s.targets for s in samples])),
        prefix_lengths=torch.tensor([s.prefix_length for s in samples], dtype=torch.int64),
        lengths=torch.tensor([len(s.tokens) for s in samples], dtype=torch.int64),
        sample_ids=torch.tensor(sample_ids, dtype=torch.int64),
        is_full=all(len(s.tokens) == seq_length for s in samples),
    )
