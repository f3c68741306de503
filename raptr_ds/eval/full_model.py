"""The loss of the full model on held-out text, at any step of any path."""

from raptr_ds.runtime.session import Session
from raptr_ds.runtime.state import RunState


def evaluate(session: Session, state: RunState) -> float:
    """Evaluate the model on the run's validation batches, record and return the loss; all ranks call it alike.

    The full model, whatever path was trained; where the method grows it, all layers that the last step had.
    """
    session.long_work_ahead()
    model = session.method.model_at(state.step - 1)
    batches = (session.batches.validation(index) for index in range(session.config.eval.batches))
    loss = session.engine.evaluate(batches, model)
    session.record_evaluation(state, loss, model.length)
    return loss
