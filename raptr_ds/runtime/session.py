"""A run set up: everything the loop works with, and what it does around a step."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from raptr_ds.checkpoint.manager import Checkpoints, SaveReport
from raptr_ds.config.run import RunConfig
from raptr_ds.data.batch import StepBatch
from raptr_ds.data.loader import Loader
from raptr_ds.engine.learning_rate import learning_rate_at
from raptr_ds.engine.protocol import Engine, StepResult
from raptr_ds.errors import Exit
from raptr_ds.parallel.agreement import PathAgreement, on_first_rank
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.paths import LayerPath, PathMethod
from raptr_ds.paths.cost import StepFlops
from raptr_ds.runtime.events import EventLog
from raptr_ds.runtime.exports import Exports
from raptr_ds.runtime.lost_ranks import ending_alone
from raptr_ds.runtime.method import LAYERS, existing_layers
from raptr_ds.runtime.metrics import Metrics, TrainingStep
from raptr_ds.runtime.ranks import Ranks
from raptr_ds.runtime.signal_lead import SignalLead
from raptr_ds.runtime.signals import LONG_WORK_SECONDS, StopSignals
from raptr_ds.runtime.state import RunState
from raptr_ds.runtime.watchdog import SAVE_SECONDS, Watchdog

_WAIT_SECONDS = 0.1


@dataclass
class Session:
    """The parts of one run on one rank; `state` is where it starts from.

    recorded: what each checkpoint holds besides the state: the optimizer's name, the run's identity, and what it was
    begun from. saved: the state of the run's newest checkpoint, even if it is still being written. has_open_evaluation:
    whether the run stands at a step whose evaluation is due and was not finished.
    """

    config: RunConfig
    groups: ProcessGroups
    method: PathMethod
    cost: StepFlops
    engine: Engine
    batches: Loader
    agreement: PathAgreement
    ranks: Ranks
    checkpoints: Checkpoints
    exports: Exports
    metrics: Metrics
    signals: StopSignals
    watchdog: Watchdog
    events: EventLog
    state: RunState
    recorded: dict[str, Any]
    saved: RunState | None = None
    lead: SignalLead = field(default_factory=SignalLead)
    has_open_evaluation: bool = False
    num_trained: int = 0  # steps since this start
    failed_saves: int = 0  # since this start
    unsaved: SaveReport | None = None  # the last save, if it failed

    def agreed_path(self, step: int) -> tuple[LayerPath, bool]:
        """Return the path of a 0-based step that all ranks agreed on, and whether they agreed to stop before it."""
        agreed = self.agreement.at(step, self.ranks.report)
        self.ranks.receive(agreed.reports)
        return agreed.path, agreed.stop

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a 0-based step."""
        scheduled = learning_rate_at(self.config.scheduler, self.config.optimizer["params"]["lr"], step)
        return scheduled * self.method.learning_rate_factor_at(step)

    def load(self, state: RunState) -> StepBatch:
        """Return this rank's share of the next step's batch. Raises: DataError, on ranks that cannot read theirs."""
        started = time.perf_counter()
        with ending_alone():
            batch = self.batches.at(state.step, state.next_sample)
        self.ranks.loaded(time.perf_counter() - started)
        return batch

    def record(
        self, state: RunState, result: StepResult, path: LayerPath, learning_rate: float, seconds: float
    ) -> None:
        """Record one step."""
        self.num_trained += 1
        self.ranks.step_done(state.step, result.own_seconds)
        self.metrics.record_step(
            TrainingStep(
                state,
                result,
                path,
                learning_rate,
                seconds,
                tokens=self.cost.tokens,
                flops=self.cost.flops(path, result.num_predictions),
                failed_saves=self.failed_saves,
                ranks=self.ranks,
            )
        )
        if slow := self.ranks.slow_event(state.step):
            self.events.record("slow_rank", step=state.step, **asdict(slow))
        self.lead.step_done(seconds)
        self._report_saved(self.checkpoints.poll())
        self.exports.poll()
        self.signals.progressed()
        self.watchdog.step_done(state.step, seconds)

    def long_work_ahead(self, what: str, allow_seconds: float = 0.0) -> None:
        """Announce work that may take long, so that silence is not taken for a hang; allow_seconds: if very long."""
        self.signals.progressed(allow_seconds=LONG_WORK_SECONDS)
        self.watchdog.moved(what, allow_seconds)

    def is_checkpoint_due(self, before: RunState, state: RunState) -> bool:
        """Return whether to save after the step from `before` to `state`.

        Not while steps are being skipped: their checkpoints would hold the same weights again, and would push out of
        `keep` those from before, which a rollback needs. What fell due meanwhile is due after the next finite step.
        """
        return not state.skipped_in_row and self.config.checkpoint.due(state.step, since=before.last_finite_step)

    def save(self, state: RunState) -> None:
        """Write a checkpoint, unless the last one is of this state: a stop may follow a save that was due."""
        if state == self.saved:
            self.finish_saving()
            if self.unsaved is None:
                return
        self.long_work_ahead("saving", SAVE_SECONDS)
        self.saved = state
        self.metrics.sync()
        layers = {LAYERS: existing_layers(self.method, state.step)}
        recorded = {**asdict(state), **self.recorded, **layers, **self.exports.mark(state.step)}
        self.checkpoints.save(self.engine, state.step, self.config.model, recorded)

    def agree_to_stop(self) -> bool:
        """Return whether any rank has been asked to stop; all ranks call it between two pieces of long work."""
        asked = torch.tensor(int(self.signals.requested))
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=self.groups.control)
        return bool(asked)

    def finish_saving(self) -> None:
        """Wait for what is still being written."""
        self.long_work_ahead("saving", SAVE_SECONDS)
        self._report_saved(self.checkpoints.wait())

    def finish_exports(self) -> bool:
        """Wait for exports and their evaluation; return whether all came to an end before a rank was asked to stop."""
        if not self.config.checkpoint.export_interval:
            return True
        if pending := self.exports.pending:
            self.metrics.say(f"the run is trained; waiting for {pending}")
        while True:
            self.exports.poll()
            pending = self.exports.pending  # of rank 0; the others wait in short collectives, as none may time out
            flags = torch.tensor([bool(pending), self.signals.requested], dtype=torch.int64)
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.groups.control)
            is_pending, stop = map(bool, flags.tolist())
            if not is_pending or stop:
                return not is_pending
            self.long_work_ahead("waiting for exports")
            time.sleep(_WAIT_SECONDS)

    def finish(self, code: Exit) -> Exit:
        """Wait for what is still being written; return how the run ended: STORAGE unless all of it is on the disk."""
        self.agreement.restart()
        self.finish_saving()
        what = "the run is trained"
        if code is Exit.DONE and not self.finish_exports():
            code = Exit.CONTINUE_LATER
        elif code is Exit.CONTINUE_LATER and (pending := self.exports.pending):
            self.metrics.say(f"left for the next start: {pending}")
        if code is Exit.CONTINUE_LATER:
            reason = self.signals.reason or "asked by another rank"
            self.events.record("stop", reason=reason)
            what = f"stopped ({reason})"
        missing = [f"the checkpoint of step {self.unsaved.step}: {self.unsaved.error}"] if self.unsaved else []
        if failure := on_first_rank(self.groups, self.metrics.finish_writing):
            missing.append(f"some of its metrics: {failure}")
        if missing:
            self.metrics.say(f"{what}, but not all of it is on the disk: {'; '.join(missing)}. Start again to go on.")
            code = Exit.STORAGE
        elif code is Exit.CONTINUE_LATER:
            self.metrics.say(f"{what}; start again to continue")
        self.events.record("end", exit_code=int(code))
        if code is Exit.DONE and self.events.failure is not None:  # a supervisor would miss the end
            self.metrics.say(
                f"{what}, but events.jsonl cannot be written: {self.events.failure}. Start again to go on."
            )
            return Exit.STORAGE
        return code

    def _report_saved(self, reports: Sequence[SaveReport]) -> None:
        for report in reports:
            self.exports.saved(report)
            if report.error is not None:
                self.failed_saves += 1
                self.unsaved = report
                self.events.record("checkpoint_failed", step=report.step, error=report.error)
                continue
            self.unsaved = None
            self.events.record(
                "checkpoint", step=report.step, bytes=report.num_bytes, seconds=round(report.write_seconds, 3)
            )
            self.metrics.say(
                f"checkpoint of step {report.step}: {report.num_bytes / 1e6:.1f} MB, training stood still for "
                f"{report.stop_seconds:.3f} s, written in {report.write_seconds:.3f} s"
            )
            self.lead.saved(report.stop_seconds + report.write_seconds)
        if short := self.lead.shortage():
            self.metrics.say(str(short))
            self.events.record("signal_lead", lead=short.lead, needed=round(short.needed, 3), write=short.write)


def evaluate(session: Session, state: RunState) -> bool:
    """Evaluate the model on the run's validation batches and record the loss; all ranks call it.

    The full model, whatever path was trained; where the method grows it, all layers that the last step had.
    Returns whether it came to the end; if a rank is asked to stop meanwhile, nothing is recorded.
    Raises: DataError, on the ranks that cannot read their data.
    """
    session.long_work_ahead("evaluating")
    model, stopped = session.method.model_at(state.step - 1), session.agree_to_stop()

    def batches() -> Iterator[StepBatch]:
        nonlocal stopped
        for index in range(session.config.eval.batches):
            if index and (stopped := session.agree_to_stop()):
                return
            session.watchdog.moved("evaluating")
            with ending_alone():
                batch = session.batches.validation(index)
            yield batch

    started = time.perf_counter()
    loss = 0.0 if stopped else session.engine.evaluate(batches(), model)
    if not stopped:
        session.lead.evaluated(time.perf_counter() - started, session.config.eval.batches)
        session.metrics.record_evaluation(state.step, loss, model.length)
    return not stopped
