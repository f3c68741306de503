"""What a rank trains on in one step, as values: micro batches and the step's batch."""

from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True)
class MicroBatch:
    """Samples that go through the model together.

    Shapes: tokens (b, T) int64; positions (N,) int64, flat indices into b * T of the predicted positions; targets
    (N,) int64, the token to predict at each; prefix_lengths (b,) int64, leading positions seen in both directions;
    lengths (b,) int64, real positions, padding behind them; sample_ids (b,) int64, places in the step's global batch.
    is_full says that no position is padding; it is known on the host, so that asking it costs no synchronization.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    prefix_lengths: torch.Tensor
    lengths: torch.Tensor
    sample_ids: torch.Tensor
    is_full: bool

    @property
    def num_predictions(self) -> int:
        """Number of predicted positions N."""
        return self.targets.shape[0]

    def to(self, device: torch.device) -> "MicroBatch":
        """Return the micro batch on `device`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {
            name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in values.items()
        }
        return MicroBatch(**moved)


@dataclass(frozen=True)
class StepBatch:
    """One data-parallel rank's share of a step: its micro batches, in order."""

    micro_batches: tuple[MicroBatch, ...]

    @property
    def num_predictions(self) -> int:
        """Predicted positions of this rank's share."""
        return sum(micro.num_predictions for micro in self.micro_batches)

    def to(self, device: torch.device) -> "StepBatch":
        """Return the batch on `device`."""
        return StepBatch(tuple(micro.to(device) for micro in self.micro_batches))
