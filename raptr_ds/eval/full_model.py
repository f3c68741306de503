"""The loss of the full model on held-out text, at any step of any path."""

from raptr_ds.paths import Path
from raptr_ds.runtime.session import Session
from raptr_ds.runtime.state import RunState


def evaluate(session: Session, state: RunState) -> float:
    """Evaluate the full model on the run's validation batches, record and return the loss; all ranks call it alike."""
    session.long_work_ahead()
    full = Path.full(session.config.model.num_layers)
    batches = (session.batches.validation(index) for index in range(session.config.eval.batches))
    loss = session.engine.evaluate(batches, full)
    session.record_evaluation(state, loss, full.length)
    return loss
