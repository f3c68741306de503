"""What the training loop asks of an engine, and what it gets back."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from raptr_ds.data.batch import StepBatch
from raptr_ds.engine.fragments import Fragment, Holder, create_state, fragments_of, step_counts
from raptr_ds.paths.growth import Growth
from raptr_ds.paths.path import LayerPath


@dataclass(frozen=True)
class StepResult:
    """One training step.

    loss: mean over all num_predictions predicted positions of the global batch. grad_norm: of the whole model, before
    clipping. skipped: the loss or a gradient was not finite, so no weight changed on any rank.
    own_seconds: how long this rank worked without waiting for others, 0 where that was not measured.
    """

    loss: float
    grad_norm: float
    num_predictions: int
    skipped: bool = False
    own_seconds: float = 0.0


class Engine(ABC):
    """Trains one step along a path, evaluates along a path, and saves and restores its state by parameter name.

    inner_optimizer: what steps the fp32 weights. What is not abstract is right for a lone rank in fp32.
    """

    inner_optimizer: torch.optim.Optimizer

    @abstractmethod
    def train_step(self, batch: StepBatch, path: LayerPath, step: int, learning_rate: float) -> StepResult:
        """Train step `step` (0-based) along `path` on this rank's share of the batch. Collective: all ranks call it."""

    @abstractmethod
    def evaluate(self, batches: Iterable[StepBatch], path: LayerPath) -> float:
        """Return the mean loss over all predicted positions of `batches` along `path`, without dropout."""

    @abstractmethod
    def grow(self, growth: Growth) -> None:
        """Give the new layers the weights and the optimizer state that they begin with. Collective."""

    @abstractmethod
    def _holders(self) -> list[Holder]:
        """Return where this rank's fp32 weights lie in the tensors that the inner optimizer steps."""

    def fragments(self) -> list[Fragment]:
        """Return views of all fp32 weights and optimizer states that this rank holds."""
        return fragments_of(self._holders(), self.inner_optimizer)

    def owns(self, fragment: Fragment) -> bool:
        """Whether this rank writes the fragment to checkpoints; each element of the model has exactly one such rank."""
        return True

    def step_counts(self) -> dict[str, float]:
        """Return how many steps the optimizer has made on each parameter of this rank; under `freeze` layers differ."""
        return step_counts(self._holders(), self.inner_optimizer)

    def create_state(self, kinds: Mapping[str, set[str]], counts: Mapping[str, float]) -> None:
        """Replace the optimizer's state by zeros of these kinds and by these step counts, both by parameter name."""
        create_state(self._holders(), self.inner_optimizer, kinds, counts)

    def refresh_weights(self) -> None:  # noqa: B027 - in fp32 they are the same
        """Copy the fp32 weights to the working weights, after a checkpoint was loaded into the former."""

    def loss_scaler_state(self) -> dict[str, float]:
        """Return fp16's dynamic loss scale and its counters; empty in other precisions."""
        return {}

    def load_loss_scaler_state(self, values: Mapping[str, float]) -> None:  # noqa: B027 - fp32 has none
        """Restore what `loss_scaler_state` returned, if the loss scale is dynamic here."""
