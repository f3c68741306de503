"""When numbers are not finite: what a run does once too many steps in a row had to be skipped.

The engine has skipped each of these steps on all ranks, so no weight has moved since before the first. All ranks decide
by the same numbers and come to the same end without asking each other.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from raptr_ds.engine.protocol import StepResult
from raptr_ds.errors import CheckpointError, NonFiniteError
from raptr_ds.runtime.metrics_file import ROLLED_BACK
from raptr_ds.runtime.state import RunState, run_state_of

if TYPE_CHECKING:
    from raptr_ds.runtime.session import Session

MAX_ROLLBACKS_TO_ONE_STEP = 3
"""A fourth time it is not the data."""

_FIX = (
    "Lower optimizer.params.lr or gradient_clipping, or lengthen the warm-up; with fp16, train in bf16. "
    "raptr_ds.train.on_non_finite=rollback (with raptr_ds.checkpoint.interval) goes back and leaves the data out; "
    "raptr_ds.train.max_non_finite_steps=0 goes on whatever happens."
)


def must_recover(state: RunState, max_steps: int) -> bool:
    """Return whether the run must roll back or stop after `state`; max_steps: skipped in a row, 0 for any number."""
    return 0 < max_steps <= state.skipped_in_row


def may_roll_back(state: RunState, to_step: int) -> bool:
    """Return whether one more rollback to the checkpoint of `to_step` may help."""
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


def recover(session: Session, state: RunState, result: StepResult) -> RunState:
    """Roll the engine and the metrics back and return the state to go on from; all ranks call it.

    The checkpoint is the newest good one from before the first skipped step, or else one in their row. Steps after it
    are trained again, along the same paths at the same learning rates, on data that the run has not seen: the window
    that failed, and what lies between it and the checkpoint, is left out. The new branch of the run is saved at once,
    so that an interrupted run continues it and does not meet the same data again.
    Raises: NonFiniteError, on all ranks, if the run is to stop or cannot roll back; checkpoints stay.
    """
    happened, train = what_happened(state, result.loss, result.grad_norm), session.config.train
    session.agreement.restart()  # the step that is being agreed on will not be the next
    session.finish_saving()
    if train.on_non_finite == "stop":
        raise NonFiniteError(f"{happened} (raptr_ds.train.max_non_finite_steps={train.max_non_finite_steps}). {_FIX}")
    try:
        before = state.last_finite_step
        restore = partial(session.checkpoints.restore, session.engine, "auto", session.config.model)
        # A stop in the row may have pushed it out of `keep` by a checkpoint of the same weights.
        restored = restore(not_after=before) or restore(not_after=state.step)
        if restored is None:
            raise CheckpointError(f"{session.checkpoints.folder} has no checkpoint of step {before} or before.")
        there = run_state_of(restored, session.config)
    except CheckpointError as error:
        raise NonFiniteError(f"{happened}, and there is no way back: {error} {_FIX}") from error
    if not may_roll_back(state, there.step):
        raise NonFiniteError(
            f"{happened}, and {state.rollbacks_there} rollbacks to step {there.step}, each with other data, did not "
            f"help. {_FIX}"
        )
    session.metrics.rewind(there.step)
    session.exports.go_back(there.step)
    rolled_back = state.rolled_back(there)
    session.metrics.say(
        f"{happened}. Rolled back to {restored.folder}, and on with other data: "
        f"{state.next_sample - there.next_sample} samples are left out. The metrics of these steps are in {ROLLED_BACK}"
    )
    session.events.record("rolled_back", step=state.step, to_step=there.step)
    session.save(rolled_back)
    return rolled_back
