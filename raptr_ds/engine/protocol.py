"""What the loop asks of an engine, and what it gets back."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from raptr_ds.data.batch import StepBatch
from raptr_ds.engine.fragments import Fragment
from raptr_ds.paths.growth import Growth
from raptr_ds.paths.path import LayerPath


@dataclass(frozen=True)
class StepResult:
    """One training step.

    loss: mean over all predicted positions of the global batch, of which there are num_predictions. grad_norm: of the
    whole model, before clipping.
    skipped: the loss or a gradient was not finite, so that no weight moved, on any rank. loss_scale: fp16's, else 1.
    """

    loss: float
    grad_norm: float
    num_predictions: int
    skipped: bool = False
    loss_scale: float = 1.0


class Engine(Protocol):
    """Carries paths: trains one step along a path, evaluates along a path, and gives and takes its state by name."""

    def train_step(self, batch: StepBatch, path: LayerPath, step: int, learning_rate: float) -> StepResult:
        """Train step `step` (0-based) on this rank's share of the batch along `path`; all ranks call it alike."""
        ...

    def evaluate(self, batches: Iterable[StepBatch], path: LayerPath) -> float:
        """Return the mean loss over all predicted positions of `batches` along `path`, without dropout."""
        ...

    def grow(self, growth: Growth) -> None:
        """Make the new layers copies of those they grow from, with their optimizer state or with none; all ranks call
        it alike."""
        ...

    def fragments(self) -> list[Fragment]:
        """Return views of all fp32 weights and optimizer states that this rank holds."""
        ...

    def owns(self, fragment: Fragment) -> bool:
        """Whether this rank is the one that writes the fragment: each element of the model has one such rank."""
        ...

    def step_counts(self) -> dict[str, float]:
        """Return the optimizer's steps on each parameter of this rank, by name; under `freeze` layers differ."""
        ...

    def create_state(self, kinds: Mapping[str, set[str]], counts: Mapping[str, float]) -> None:
        """Make the optimizer hold just these kinds of state for each parameter, zero, with these step counts."""
        ...

    def refresh_weights(self) -> None:
        """Make the working weights follow from the fp32 ones, after these were loaded."""
        ...

    def loss_scaler_state(self) -> dict[str, float]:
        """Return fp16's loss scale and its counters; empty in other precisions."""
        ...

    def load_loss_scaler_state(self, values: Mapping[str, float]) -> None:
        """Restore what `loss_scaler_state` gave."""
        ...
