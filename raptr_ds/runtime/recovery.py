"""Leaving a row of steps that were not finite: back to a checkpoint from before it, past its data; or a clean end."""

from raptr_ds.checkpoint.manager import RestoredState
from raptr_ds.engine.protocol import StepResult
from raptr_ds.errors import CheckpointError, NonFiniteError
from raptr_ds.runtime.metrics_file import ROLLED_BACK
from raptr_ds.runtime.non_finite import MENDS, what_happened
from raptr_ds.runtime.session import Session
from raptr_ds.runtime.state import RunState


def recover(session: Session, state: RunState, result: StepResult) -> RunState:
    """Roll the engine and the metrics back and return where the run goes on; all ranks call it alike.

    The checkpoint is the newest good one from before the first skipped step. Steps after it are trained again, along
    the same paths at the same learning rates, on data that the run has not seen: the window that failed, and what lies
    between it and the checkpoint, is left out. The new course is saved at once, so that an interrupted run goes on
    with it and does not meet the same data again.
    Raises: NonFiniteError, on all ranks alike, if the run is to stop or cannot roll back; checkpoints stay.
    """
    happened = what_happened(state, result.loss, result.grad_norm)
    session.agreement.restart()  # whatever comes now, the step that is being agreed on is not next
    session.finish_saving()
    if not session.non_finite.rolls_back:
        raise NonFiniteError(
            f"{happened} (raptr_ds.train.max_non_finite_steps={session.non_finite.max_steps}). {MENDS}"
        )
    try:
        restored = _restore(session, state)
        there = session.run_state_of(restored)
    except CheckpointError as error:
        raise NonFiniteError(f"{happened}, and there is no way back: {error} {MENDS}") from error
    if not session.non_finite.may_roll_back(state, there.step):
        raise NonFiniteError(
            f"{happened}, and {state.rollbacks_there} rollbacks to step {there.step}, each with other data, did not "
            f"help. {MENDS}"
        )
    session.metrics.rewind(there.step)
    rolled_back = state.rolled_back(there)
    session.metrics.say(
        f"{happened}. Rolled back to {restored.folder}, and on with other data: {state.data_step - there.data_step} "
        f"batches are left out. The metrics of these steps are in {ROLLED_BACK}"
    )
    session.save(rolled_back)
    return rolled_back


def _restore(session: Session, state: RunState) -> RestoredState:
    """Load the newest good checkpoint from before the skipped steps. Raises: CheckpointError if there is none."""
    limit = state.last_finite_step
    restored = session.checkpoints.restore(session.engine, "auto", session.config.model, not_after=limit)
    if restored is None:
        raise CheckpointError(f"{session.checkpoints.folder} has no checkpoint of step {limit} or before.")
    return restored
