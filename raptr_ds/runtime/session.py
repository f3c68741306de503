"""A run set up: everything the loop works with, built in one place and closed in one place."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from raptr_ds.atomic_file import write_atomically
from raptr_ds.checkpoint.folder import CHECKPOINTS
from raptr_ds.checkpoint.manager import Checkpoints, RestoredState, SaveReport
from raptr_ds.config.path_sections import ScheduledSection
from raptr_ds.config.run import RunConfig
from raptr_ds.data.loader import Loader, build_loader, load_tokenizer
from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.engine.build import Compilation, attention_of, build_engine, compilation_of
from raptr_ds.engine.learning_rate import learning_rate_at
from raptr_ds.engine.protocol import Engine, StepResult
from raptr_ds.errors import CheckpointError, DeviceMemoryError, Exit
from raptr_ds.model.attention_backend import AttentionBackend
from raptr_ds.parallel.agreement import PathAgreement, on_first_rank, together
from raptr_ds.parallel.groups import ProcessGroups, initialize_process_groups
from raptr_ds.parallel.launch import Launch
from raptr_ds.paths import LayerPath, PathMethod
from raptr_ds.paths.cost import num_parameters
from raptr_ds.runtime.method import left_out_layers, micro_batches_of, path_method_of, step_cost_of
from raptr_ds.runtime.metrics import Metrics, TrainingStep
from raptr_ds.runtime.metrics_file import METRICS, last_evaluation
from raptr_ds.runtime.non_finite import NonFinitePolicy
from raptr_ds.runtime.out_of_memory import memory_errors_explained
from raptr_ds.runtime.progress import Progress, build_progress
from raptr_ds.runtime.signals import StopSignals
from raptr_ds.runtime.state import RunState, StepCost
from raptr_ds.runtime.throughput import peak_flops

_OPTIMIZER = "optimizer"  # in a checkpoint's run state
_LONG_WORK_SECONDS = 600.0  # what a checkpoint or an evaluation may take before a lost launcher ends the process


@dataclass
class Session:
    """The parts of one run on one rank; `state` is where it starts from."""

    config: RunConfig
    groups: ProcessGroups
    method: PathMethod
    cost: StepCost
    engine: Engine
    batches: Loader
    agreement: PathAgreement[LayerPath]
    checkpoints: Checkpoints
    metrics: Metrics
    signals: StopSignals
    non_finite: NonFinitePolicy
    state: RunState
    num_trained: int = 0  # steps since this start

    def agreed_path(self, step: int) -> tuple[LayerPath, bool]:
        """Return the path of a 0-based step that all ranks agreed on, and whether they agreed to stop before it."""
        agreed = self.agreement.at(step)
        return agreed.path, agreed.stop

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a 0-based step."""
        scheduled = learning_rate_at(self.config.scheduler, self.config.optimizer["params"]["lr"], step)
        return scheduled * self.method.learning_rate_factor_at(step)

    def record(
        self, state: RunState, result: StepResult, path: LayerPath, learning_rate: float, seconds: float
    ) -> None:
        """Record one step."""
        self.num_trained += 1
        self.metrics.record_step(
            TrainingStep(
                step=state.step,
                loss=result.loss,
                lr=learning_rate,
                grad_norm=result.grad_norm,
                path=path,
                step_seconds=seconds,
                step_tokens=self.cost.tokens,
                step_flops=self.cost.flops(path, result.num_predictions),
                tokens=state.tokens,
                flops=state.flops,
                full_flops=state.full_flops,
                skipped=result.skipped,
                skipped_steps=state.skipped_steps,
            )
        )
        self._report_saved(self.checkpoints.poll())
        self.signals.progressed()

    def record_evaluation(self, state: RunState, loss: float, path_length: int) -> None:
        """Record one evaluation."""
        self.metrics.record_evaluation(state.step, loss, path_length)

    def long_work_ahead(self) -> None:
        """Announce that what follows may take long, so that silence is not taken for a hang."""
        self.signals.progressed(allow_seconds=_LONG_WORK_SECONDS)

    def is_checkpoint_due(self, before: RunState, state: RunState) -> bool:
        """Return whether to save after the step from `before` to `state`.

        Not while steps are being skipped: their checkpoints would hold the same weights again, and would push out of
        `keep` those from before, which a rollback needs. What fell due meanwhile is due after the next finite step.
        """
        return not state.skipped_in_row and self.config.checkpoint.due(state.step, since=before.last_finite_step)

    def save(self, state: RunState) -> None:
        """Write a checkpoint."""
        self.long_work_ahead()
        self.metrics.sync()
        run_state = {**state.to_dict(), _OPTIMIZER: self.config.optimizer["type"]}
        self.checkpoints.save(self.engine, state.step, self.config.model, run_state)

    def run_state_of(self, restored: RestoredState) -> RunState:
        """Return where the run stood in a checkpoint."""
        return _run_state_of(restored, self.config)

    def finish_saving(self) -> SaveReport | None:
        """Wait for what is still being written; return how the last save ended, if not reported yet."""
        self.long_work_ahead()
        return self._report_saved(self.checkpoints.wait())

    def finish(self, code: Exit) -> Exit:
        """Wait for what is still being written and return how the run ended: a stop without a checkpoint is a fault."""
        last = self.finish_saving()
        if code is not Exit.CONTINUE_LATER:
            return code
        reason = self.signals.reason or "asked by another rank"
        if last is not None and last.error is not None:
            self.metrics.say(f"stopped ({reason}) without a checkpoint of the last steps: {last.error}")
            return Exit.FAULT
        self.metrics.say(f"stopped ({reason}); start again to continue")
        return code

    def _report_saved(self, reports: Sequence[SaveReport]) -> SaveReport | None:
        for report in reports:
            if report.error is None:
                self.metrics.say(
                    f"checkpoint of step {report.step}: {report.num_bytes / 1e6:.1f} MB, training stood still for "
                    f"{report.stop_seconds:.3f} s, written in {report.write_seconds:.3f} s"
                )
        return reports[-1] if reports else None


@contextmanager
def open_session(config: RunConfig, launch: Launch, signals: StopSignals) -> Iterator[Session]:
    """Build the run on this rank; the user's mistakes are raised here, on all ranks, before any training.

    In this order, and closed in the reverse order:

    1. the process groups
    2. the tokenizer, which completes the configuration, the path method and the loader
    3. the lines that introduce the run, and its folder, which every rank must be able to write
    4. the engine
    5. the checkpoint to continue from
    6. metrics and the agreement on paths, from the step where the run stands

    What may fail on one rank alone is done `together`, so that no other rank waits for it.
    Raises: ConfigError, DataError, CheckpointError, DeviceMemoryError.
    """
    groups = initialize_process_groups(
        launch,
        config.parallel.tensor_model_parallel_size,
        config.parallel.pipeline_model_parallel_size,
        sequence_parallel=config.parallel.sequence_parallel,
    )
    with ExitStack() as stack:
        stack.push(_leave_groups)
        tokenizer = together(groups, lambda: load_tokenizer(config.data))
        config = together(groups, lambda: config.with_vocab_size(tokenizer.vocab_size))
        method = together(groups, lambda: path_method_of(config))
        batches = stack.enter_context(_open_batches(config, groups, tokenizer, method))
        folder = Path(str(config.train.save))
        progress = _introduce(config, groups, method)
        report = progress.say if progress is not None else print
        checkpoints = Checkpoints(folder / CHECKPOINTS, groups, config.checkpoint.keep, report)
        stack.callback(checkpoints.close)
        with memory_errors_explained(config, groups, lambda: 0):
            engine = build_engine(config, groups)
        # A requeued job continues its own run, whatever checkpoint it was started from.
        state = _restored_state(config, checkpoints, engine, "auto" if launch.restart_count else config.checkpoint.load)
        on_first_rank(groups, lambda: _write_config(folder, config))
        if progress is not None and state.step:
            progress.say(_standing(config, folder, state.step))
        cost = step_cost_of(config)
        typical_predictions = together(groups, lambda: batches.validation(0).num_predictions) * groups.topology.data
        metrics = _open_metrics(
            config, groups, folder, progress, state, lambda step: cost.flops_left(method, step, typical_predictions)
        )
        stack.enter_context(metrics)
        agreement = _agreement(config, groups, method, signals)
        signals.progressed()
        yield Session(
            config=config,
            groups=groups,
            method=method,
            cost=cost,
            engine=engine,
            batches=batches,
            agreement=agreement,
            checkpoints=checkpoints,
            metrics=metrics,
            signals=signals,
            non_finite=NonFinitePolicy(
                config.train.max_non_finite_steps or 0, config.train.on_non_finite == "rollback"
            ),
            state=state,
        )


def _open_batches(config: RunConfig, groups: ProcessGroups, tokenizer: Tokenizer, method: PathMethod) -> Loader:
    """Open this rank's data; each phase has micro batches of its own size."""
    sizes = micro_batches_of(config, method)
    return together(
        groups,
        lambda: build_loader(
            config.data,
            config.objective,
            config.model,
            config.batch,
            seed=config.train.seed,
            dp_rank=groups.data_rank,
            tokenizer=tokenizer,
            micro_batch_at=lambda step: sizes[method.phase_at(step).index],
        ),
    )


def _introduce(config: RunConfig, groups: ProcessGroups, method: PathMethod) -> Progress | None:
    """Print what the run is; return what prints from now on, on rank 0 alone."""
    attention, compilation = attention_of(config, groups), compilation_of(config, groups)  # collective
    if groups.rank:
        return None
    progress = build_progress(config.log.progress)
    for line in (*_introduction(config, groups, attention, compilation), *left_out_layers(method)):
        progress.say(line)
    if config.parallel.micro_batches:
        progress.say(f"micro batches of the phases: {', '.join(map(str, micro_batches_of(config, method)))} sequences")
    return progress


def _write_config(folder: Path, config: RunConfig) -> None:
    """Write config.json: the run file with every value in it, itself a run file."""
    write_atomically(folder / "config.json", json.dumps(config.resolved(), indent=2) + "\n")


def _restored_state(config: RunConfig, checkpoints: Checkpoints, engine: Engine, load: str) -> RunState:
    """Load the checkpoint that the run continues from into the engine; return where it stood, or the start."""
    restored = checkpoints.restore(engine, load, config.model)
    return RunState() if restored is None else _run_state_of(restored, config)


def _open_metrics(
    config: RunConfig,
    groups: ProcessGroups,
    folder: Path,
    progress: Progress | None,
    state: RunState,
    flops_left: Callable[[int], float],
) -> Metrics:
    return Metrics(
        folder if groups.rank == 0 else None,
        num_steps=config.train.steps,
        resume_step=state.step,
        interval=config.log.interval,
        tensorboard=config.log.tensorboard,
        progress=progress,
        num_devices=groups.topology.world_size,
        peak=_peak(config, groups),
        flops_left=flops_left,
    )


def _agreement(
    config: RunConfig, groups: ProcessGroups, method: PathMethod, signals: StopSignals
) -> PathAgreement[LayerPath]:
    return PathAgreement(
        groups,
        lambda step: method.path_at(step).encode(),
        LayerPath.decode,
        lambda: signals.requested,
        config.train.steps,
    )


def _run_state_of(restored: RestoredState, config: RunConfig) -> RunState:
    values = dict(restored.run_state)
    saved, wanted = values.pop(_OPTIMIZER), config.optimizer["type"]
    if saved != wanted:
        raise CheckpointError(
            f"{restored.folder} holds the state of optimizer {saved}, and optimizer.type is {wanted}. Set "
            f"optimizer.type to {saved} to continue, or raptr_ds.checkpoint.load to none to start afresh."
        )
    return RunState.from_dict(values, config.batch.global_batch)


def _standing(config: RunConfig, folder: Path, step: int) -> str:
    """Return what a restored run prints: that it continues, or that nothing is left to do, and how it ended."""
    if step < config.train.steps:
        return f"continuing after step {step}"
    evaluation = last_evaluation(folder / METRICS, config.model.num_layers, step)
    loss = "" if evaluation is None else f"; held-out loss {evaluation[1]:.4f} after step {evaluation[0]}"
    return (
        f"this run is complete: {step} of {config.train.steps} steps are trained{loss}. Raise "
        "raptr_ds.train.steps to train on, or set another raptr_ds.train.save to start afresh."
    )


def _leave_groups(_: object, error: BaseException | None, __: object) -> None:
    # Where a device has no memory left the other ranks do not come, and NCCL would wait for them.
    if dist.is_initialized() and not isinstance(error, DeviceMemoryError):
        dist.destroy_process_group()


def _peak(config: RunConfig, groups: ProcessGroups) -> float | None:
    if config.log.peak_tflops is not None:
        return config.log.peak_tflops * 1e12
    name = torch.cuda.get_device_name(groups.device) if groups.device.type == "cuda" else None
    return peak_flops(name, config.precision)


def _introduction(
    config: RunConfig, groups: ProcessGroups, attention: AttentionBackend, compilation: Compilation
) -> list[str]:
    topology = groups.topology
    model, path = config.model, config.path
    alone = topology.data == 1 and config.zero_stage in (1, 2)
    zero = f"{config.zero_stage} (run as 0: no other rank to share with)" if alone else config.zero_stage
    return [
        f"{model.architecture}: {model.num_layers} layers x {model.hidden_size}, {num_parameters(model) / 1e6:.1f} M "
        f"parameters, vocabulary {model.vocab_size}, {config.precision}",
        f"layout: tensor {topology.tensor}{' with its sequences split' if groups.sequence_parallel else ''} x "
        f"pipeline {topology.pipeline} x data {topology.data}, ZeRO {zero}, "
        f"batch {config.batch.global_batch} = {config.batch.micro_batch} x {config.batch.accumulation} accumulated x "
        f"{config.batch.data_parallel}",
        f"attention: {attention.description}; layers {'' if compilation.is_compiled else 'not '}compiled",
        *(f"warning: {warning}" for warning in (attention.warning, compilation.warning) if warning),
        f"paths: {path.method}" + (f" {path.schedule} ({path.split})" if isinstance(path, ScheduledSection) else ""),
        *(f"  derived: {line}" for line in config.derived),
    ]


def evaluate(session: Session, state: RunState) -> float:
    """Evaluate the model on the run's validation batches, record and return the loss; all ranks call it.

    The full model, whatever path was trained; where the method grows it, all layers that the last step had.
    """
    session.long_work_ahead()
    model = session.method.model_at(state.step - 1)
    batches = (session.batches.validation(index) for index in range(session.config.eval.batches))
    loss = session.engine.evaluate(batches, model)
    session.record_evaluation(state, loss, model.length)
    return loss
