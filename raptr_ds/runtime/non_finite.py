"""When numbers are not finite: what a run does once enough steps in a row had to be skipped. Pure, no torch.

The engine has skipped each of these steps on all ranks alike, so no weight has moved since before the first. All ranks
decide by the same numbers and come to the same end without asking each other.
"""

from dataclasses import dataclass

from raptr_ds.runtime.state import RunState

MAX_ROLLBACKS_TO_ONE_STEP = 3
"""A fourth time it is not the data."""

MENDS = (
    "Lower optimizer.params.lr or gradient_clipping, or lengthen the warm-up; with fp16, train in bf16. "
    "raptr_ds.train.on_non_finite=rollback (with raptr_ds.checkpoint.interval) goes back and leaves the data out; "
    "raptr_ds.train.max_non_finite_steps=0 goes on whatever happens."
)


@dataclass(frozen=True)
class NonFinitePolicy:
    """How many skipped steps in a row a run bears (0: any number), and whether it then rolls back or stops."""

    max_steps: int
    rolls_back: bool

    def is_exhausted(self, state: RunState) -> bool:
        """Tell whether the run must not go on from `state` as if nothing had happened."""
        return 0 < self.max_steps <= state.skipped_in_row

    def may_roll_back(self, state: RunState, to_step: int) -> bool:
        """Tell whether one more rollback to the checkpoint of `to_step` may help."""
        return state.rolled_back_to != to_step or state.rollbacks_there < MAX_ROLLBACKS_TO_ONE_STEP


def what_happened(state: RunState, loss: float, grad_norm: float) -> str:
    """Return which steps were skipped, the numbers of the last, and where the weights stand, for people."""
    first = state.last_finite_step + 1
    steps = (
        f"step {first}" if first == state.step else f"steps {first} to {state.step}, {state.skipped_in_row} in a row,"
    )
    return (
        f"{steps} had a loss or a gradient that is not finite (last: loss {loss:g}, gradient norm {grad_norm:g}) and "
        f"moved no weight; the weights are those after step {state.last_finite_step}"
    )
