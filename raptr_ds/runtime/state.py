"""Where a run stands: all that cannot be recomputed from (seed, step), beside the engine's state."""

from dataclasses import asdict, dataclass
from typing import Any

from raptr_ds.engine.protocol import StepResult
from raptr_ds.paths.cost import ModelShape, step_flops
from raptr_ds.paths.path import Path


@dataclass(frozen=True)
class RunState:
    """Steps done, and sums since the first step.

    tokens: positions of the sequences trained on; flops: executed; full_flops: what the full model would have executed.
    """

    step: int = 0
    tokens: int = 0
    flops: int = 0
    full_flops: int = 0

    def to_dict(self) -> dict[str, int]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunState":
        """Return the state that `to_dict` gave."""
        return cls(**values)


@dataclass(frozen=True)
class StepCost:
    """What steps of this run cost: the model's shape, sequences in a global batch, recomputation."""

    shape: ModelShape
    num_sequences: int
    recompute: bool

    @property
    def tokens(self) -> int:
        """Positions of a global batch."""
        return self.num_sequences * self.shape.seq_length

    def flops(self, path_length: int, num_predicted: int) -> int:
        """Return the FLOPs of a step."""
        return step_flops(self.shape, path_length, self.num_sequences, num_predicted, self.recompute)

    def after(self, state: RunState, result: StepResult, path: Path) -> RunState:
        """Return where the run stands after a step along `path`."""
        return RunState(
            step=state.step + 1,
            tokens=state.tokens + self.tokens,
            flops=state.flops + self.flops(path.length, result.num_predictions),
            full_flops=state.full_flops + self.flops(path.num_layers, result.num_predictions),
        )
