"""Where a run stands: all that cannot be recomputed from (seed, step), besides the engine's state."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from raptr_ds.config.run import RunConfig
from raptr_ds.errors import CheckpointError
from raptr_ds.paths.cost import StepFlops
from raptr_ds.paths.path import LayerPath

if TYPE_CHECKING:  # engines import megatron-core, which the planner does not need
    from raptr_ds.checkpoint.manager import RestoredState
    from raptr_ds.engine.protocol import StepResult

OPTIMIZER = "optimizer"
"""The key of the optimizer's name in a checkpoint's run state."""


@dataclass(frozen=True)
class RunState:
    """Steps done, and sums since the first step.

    tokens: positions of the sequences trained on; flops: executed; full_flops: what the full model would have executed.
    next_sample: the first one of the next step, a number for the loader; step * global batch unless rollbacks left
    samples out or the batch was changed. skipped_steps: steps so far that moved no weight because a number was not
    finite, those that were rolled back included; skipped_in_row: how many of them are the last steps.
    rolled_back_to, rollbacks_there: the step of the last rollback, -1 for none, and how many in a row went there.
    """

    step: int = 0
    tokens: int = 0
    flops: int = 0
    full_flops: int = 0
    skipped_steps: int = 0
    skipped_in_row: int = 0
    next_sample: int = 0
    rolled_back_to: int = -1
    rollbacks_there: int = 0

    @property
    def last_finite_step(self) -> int:
        """The steps done when the last row of skipped steps, which may be empty, began."""
        return self.step - self.skipped_in_row

    def after(self, cost: StepFlops, result: StepResult, path: LayerPath) -> RunState:
        """Return where the run stands after a step along `path`. cost: of the run's steps."""
        return replace(
            self,
            step=self.step + 1,
            tokens=self.tokens + cost.tokens,
            flops=self.flops + cost.flops(path, result.num_predictions),
            full_flops=self.full_flops + cost.flops(LayerPath.full(path.num_layers), result.num_predictions),
            skipped_steps=self.skipped_steps + int(result.skipped),
            skipped_in_row=self.skipped_in_row + 1 if result.skipped else 0,
            next_sample=self.next_sample + cost.num_sequences,
        )

    def rolled_back(self, restored: RunState) -> RunState:
        """Return how the run goes on from a checkpoint's state: with the first sample that it has not seen yet."""
        is_same_place = restored.step == self.rolled_back_to
        return replace(
            restored,
            skipped_steps=self.skipped_steps,
            skipped_in_row=0,
            next_sample=self.next_sample,
            rolled_back_to=restored.step,
            rollbacks_there=self.rollbacks_there + 1 if is_same_place else 1,
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any], global_batch: int) -> RunState:
        """Return the state that `asdict` gave, of this version or an earlier one; other keys are ignored.

        global_batch: sequences of a step, by which earlier versions counted the data.
        """
        batches_read = values["step"] + values.get("data_offset_steps", 0)
        values = {"next_sample": batches_read * global_batch, **values}
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})


def run_state_of(restored: RestoredState, config: RunConfig) -> RunState:
    """Return where the run stood in a checkpoint. Raises: CheckpointError if it is of another optimizer."""
    saved, wanted = restored.run_state[OPTIMIZER], config.optimizer["type"]
    if saved != wanted:
        raise CheckpointError(
            f"{restored.folder} holds the state of optimizer {saved}, and optimizer.type is {wanted}. Set "
            f"optimizer.type to {saved} to continue, or raptr_ds.checkpoint.load to none to start afresh."
        )
    return RunState.from_dict(restored.run_state, config.batch.global_batch)
