"""Building a run: everything that the loop works with, made in one place and closed in one place."""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

import raptr_ds
from raptr_ds.atomic_file import write_atomically
from raptr_ds.checkpoint.folder import CHECKPOINTS, checkpoints_in
from raptr_ds.checkpoint.manager import Checkpoints, RestoredState
from raptr_ds.checkpoint.manifest import DamagedCheckpointError
from raptr_ds.checkpoint.read import read_manifest
from raptr_ds.config.run import RunConfig
from raptr_ds.config.sections import LogSection
from raptr_ds.data.loader import Loader, build_loader, load_tokenizer
from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.engine.build import build_engine
from raptr_ds.engine.protocol import Engine
from raptr_ds.errors import RaptrError
from raptr_ds.parallel.agreement import PathAgreement, gathered, on_first_rank, together
from raptr_ds.parallel.groups import ProcessGroups, initialize_process_groups, launch_store
from raptr_ds.parallel.launch import Launch
from raptr_ds.parallel.roll_call import meet
from raptr_ds.paths import PathMethod
from raptr_ds.runtime.elastic_memory import fitted_to_memory
from raptr_ds.runtime.events import EventLog, code_revision
from raptr_ds.runtime.export_check import ExportCheck
from raptr_ds.runtime.exports import Exports
from raptr_ds.runtime.identity import IDENTITY, Changes, Identity, changes_since
from raptr_ds.runtime.introduction import device_peak, introduce, standing
from raptr_ds.runtime.method import check_layers, micro_batches_of, path_method_of, step_cost_of
from raptr_ds.runtime.metrics import Metrics
from raptr_ds.runtime.metrics_file import METRICS, read_metrics
from raptr_ds.runtime.out_of_memory import memory_errors_explained
from raptr_ds.runtime.ranks import NUM_REPORTED, Ranks
from raptr_ds.runtime.run_lock import RunLock
from raptr_ds.runtime.session import Session
from raptr_ds.runtime.signal_lead import SignalLead
from raptr_ds.runtime.signals import StopSignals, stat_fields
from raptr_ds.runtime.sinks import Sink
from raptr_ds.runtime.state import OPTIMIZER, RunState, run_state_of
from raptr_ds.runtime.tensorboard_sink import TensorBoardSink
from raptr_ds.runtime.tracking import open_trackers
from raptr_ds.runtime.watchdog import START_SECONDS, Watchdog
from raptr_ds.user_paths import open_to_all, writing

_ORIGIN = "begun_from"  # in a checkpoint's run state: what raptr_ds.checkpoint.load asked for
_MEETING = timedelta(minutes=30)


class _StartTimes:
    """The seconds of a start by part, in order; the first one, `imports`, began with the process."""

    def __init__(self) -> None:
        began = int(stat_fields(os.getpid())[19]) / os.sysconf("SC_CLK_TCK")  # starttime, in ticks since the boot
        self.seconds = {"imports": round(time.clock_gettime(time.CLOCK_BOOTTIME) - began, 2)}
        self._last = time.monotonic()

    def done(self, part: str) -> None:
        """What has happened since the part before was `part`."""
        now = time.monotonic()
        self.seconds[part] = round(now - self._last, 2)
        self._last = now


@contextmanager
def open_session(config: RunConfig, launch: Launch, signals: StopSignals) -> Iterator[Session]:
    """Build the run on this rank; the user's mistakes are raised here, on all ranks, before any training.

    In this order, and closed in the reverse order:

    1. the process groups
    2. the tokenizer, which completes the configuration, the path method and the loader
    3. the lines that introduce the run, and its folder: locked, and one that every rank can write
    4. the engine
    5. the checkpoint to continue from
    6. metrics, events, exports and the agreement on paths, from the step where the run stands

    What may fail on one rank alone is done `together`, so that no other rank waits for it. No rank leaves before all
    have come to the end: the first one serves the store.
    Raises: ConfigError, DataError, CheckpointError, PathError, StorageError, DeviceMemoryError.
    """
    times = _StartTimes()
    groups = initialize_process_groups(
        launch,
        config.parallel.tensor_model_parallel_size,
        config.parallel.pipeline_model_parallel_size,
        sequence_parallel=config.parallel.sequence_parallel,
    )
    times.done("rendezvous")
    folder = Path(config.train.save)
    written = folder if groups.rank == 0 else None  # the run's folder, where this rank writes metrics, events, exports
    with ExitStack() as stack:
        stack.push(lambda _, error, __: _leave(groups, error))
        watchdog = Watchdog(launch_store(), groups.rank, launch.world_size, folder, config.train.watchdog_seconds)
        stack.callback(watchdog.close)
        tokenizer = together(groups, lambda: load_tokenizer(config.data))
        config = together(groups, lambda: config.with_vocab_size(tokenizer.vocab_size))
        config = fitted_to_memory(config, groups, launch, print)
        method = together(groups, lambda: path_method_of(config))
        batches = stack.enter_context(_open_batches(config, groups, tokenizer, method))
        progress = introduce(config, groups, method, launch.launcher)
        on_first_rank(groups, lambda: _lock(folder, launch, stack, progress.say))
        checkpoints = Checkpoints(folder / CHECKPOINTS, groups, config.checkpoint.keep, progress.say)
        stack.callback(checkpoints.close)
        is_checking = groups.rank == 0 and not launch.restart_count  # the user's own start was checked
        check = together(groups, lambda: ExportCheck(config, folder, progress.say, is_checking))
        stack.callback(check.close)
        times.done("data")
        with memory_errors_explained(config, groups, lambda: 0):
            engine = build_engine(config, groups)
        times.done("engine")
        identity = on_first_rank(groups, lambda: Identity.of(config, tokenizer))
        begun = _begin(config, launch, checkpoints, engine, method, identity, progress.say)
        state = begun.state
        together(groups, check.finish)
        times.done("checkpoint")
        on_first_rank(groups, lambda: _write_config(folder, config))
        if state.step:
            progress.say(on_first_rank(groups, lambda: standing(config, folder, state.step, begun.is_own)))
        cost = step_cost_of(config)
        num_predicted = together(groups, lambda: batches.validation(0).num_predictions) * groups.topology.data
        metrics = together(
            groups,
            lambda: Metrics(
                written,
                num_steps=config.train.steps,
                resume_step=begun.own_step,
                corpus=identity.corpus if begun.changes.corpus is None else begun.changes.corpus[0],
                interval=config.log.interval,
                sinks=_open_sinks(config.log, folder, begun.own_step) if groups.rank == 0 else (),
                progress=progress,
                num_devices=groups.topology.world_size,
                peak=device_peak(config, groups),
                flops_left=partial(cost.flops_left, method, num_predicted=num_predicted),
            ),
        )
        stack.callback(metrics.close)
        events = together(groups, lambda: EventLog(written))
        stack.callback(events.close)
        exports = Exports(config, written, checkpoints, metrics, events)
        stack.callback(exports.close)
        together(groups, lambda: exports.begin(state.step, begun.is_own))
        hosts = gathered(socket.gethostname(), groups.control)
        times.done("metrics")
        _record_start(events, hosts, groups, launch, begun, metrics, times)
        agreement = PathAgreement(groups, method.path_at, lambda: signals.requested, config.train.steps, NUM_REPORTED)
        signals.progressed()
        watchdog.moved("starting", START_SECONDS)
        yield Session(
            config=config,
            groups=groups,
            method=method,
            cost=cost,
            engine=engine,
            batches=batches,
            agreement=agreement,
            ranks=Ranks(groups.topology, hosts, groups.device, config.log.interval),
            checkpoints=checkpoints,
            exports=exports,
            metrics=metrics,
            signals=signals,
            watchdog=watchdog,
            events=events,
            state=state,
            recorded=begun.recorded,
            saved=state if begun.own_step else None,
            lead=SignalLead(launch.signal_lead),
            has_open_evaluation=on_first_rank(groups, lambda: _has_open_evaluation(config, method, folder, state)),
        )


def _lock(folder: Path, launch: Launch, stack: ExitStack, report: Callable[[str], None]) -> None:
    stack.callback(RunLock(folder, launch).release)
    if warning := open_to_all(folder):
        report(f"warning: {warning}")


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


def _where_from(
    config: RunConfig, launch: Launch, origin: str, checkpoints: Path, report: Callable[[str], None]
) -> str:
    """Return what to load: a run that was begun as asked and has checkpoints of its own by now continues from these.

    One that is to start anew does so when its user starts it, and continues when it is started again without its user.
    A damaged checkpoint is left to `restore`.
    """
    load = config.checkpoint.load
    if load == "auto" or (load == "none" and not launch.restart_count):
        return load
    unrecorded = origin if launch.restart_count else None  # by a version that recorded folders alone
    for own in checkpoints_in(checkpoints):
        try:
            manifest = read_manifest(own)
        except DamagedCheckpointError:
            continue
        if manifest.run_state.get(_ORIGIN, unrecorded) != origin:
            break
        if load != "none":
            report(
                f"this run was begun from {load} and has come to step {manifest.step} since: it continues there. To "
                "begin again from that checkpoint, set another raptr_ds.train.save"
            )
        return "auto"
    return load


def _origin(load: str, launch: Launch) -> str:
    """Return what distinguishes a run that was begun as `load` asks from others in its folder."""
    if load == "auto":
        return load
    return f"none, by {launch.begun_by}" if load == "none" else str(Path(load).absolute())


@dataclass(frozen=True)
class _Begun:
    """Where a start stands: its state, what has changed since, and whether it is by a checkpoint of the run's own.

    recorded: what each checkpoint holds besides the state.
    """

    state: RunState
    changes: Changes
    is_own: bool
    recorded: dict[str, Any]

    @property
    def own_step(self) -> int:
        """The step up to which what lies in the run's folder belongs to it; 0 for nothing."""
        return self.state.step if self.is_own else 0


def _begin(
    config: RunConfig,
    launch: Launch,
    checkpoints: Checkpoints,
    engine: Engine,
    method: PathMethod,
    identity: Identity,
    report: Callable[[str], None],
) -> _Begun:
    """Load the checkpoint that the run continues from into the engine; all ranks call it."""
    origin = _origin(config.checkpoint.load, launch)
    load = on_first_rank(checkpoints.groups, lambda: _where_from(config, launch, origin, checkpoints.folder, report))
    recorded = {OPTIMIZER: config.optimizer["type"], IDENTITY: asdict(identity), _ORIGIN: origin}

    def check(restored: RestoredState) -> None:
        run_state_of(restored, config)
        changes_since(restored.run_state, identity, restored.folder)
        check_layers(restored, method)

    restored = checkpoints.restore(engine, load, config.model, check=check)
    if restored is None:
        return _Begun(RunState(), Changes({}, None), True, recorded)
    changes = changes_since(restored.run_state, identity, restored.folder)
    return _Begun(run_state_of(restored, config), changes, checkpoints.has(restored.folder), recorded)


def _write_config(folder: Path, config: RunConfig) -> None:
    """Write config.json: the run file with every value in it, itself a run file."""
    path = folder / "config.json"
    with writing(path, "Give this user permission to write it."):
        write_atomically(path, json.dumps(config.resolved(), indent=2) + "\n")


def _open_sinks(log: LogSection, folder: Path, resume_step: int) -> list[Sink]:
    trackers = open_trackers(log, folder, resume_step)
    return [*trackers, TensorBoardSink(folder, resume_step)] if log.tensorboard else [*trackers]


def _record_start(
    events: EventLog,
    hosts: list[str],
    groups: ProcessGroups,
    launch: Launch,
    begun: _Begun,
    metrics: Metrics,
    times: _StartTimes,
) -> None:
    """Write down how the run was started, and what is not as it was when its checkpoint was written."""
    if groups.rank:
        return
    events.record(
        "start",
        step=begun.state.step,
        launcher=launch.launcher,
        hosts=list(dict.fromkeys(hosts)),
        world_size=launch.world_size,
        layout=asdict(groups.topology),
        restart_count=launch.restart_count,
        slurm_job=launch.slurm_job or None,
        version=raptr_ds.__version__,
        revision=code_revision(),
        seconds=times.seconds,
    )
    changes, step = begun.changes, begun.state.step
    for line in changes.lines:
        metrics.say(line)
    if changes.keys or changes.corpus:
        events.record("changed", step=step, keys=changes.keys, corpus=changes.corpus)
    if changes.corpus is not None:
        metrics.record_corpus(step, *changes.corpus)


def _has_open_evaluation(config: RunConfig, method: PathMethod, folder: Path, state: RunState) -> bool:
    if not state.step or not config.evaluates_after(state.step):
        return False
    key = (state.step, method.model_at(state.step - 1).length)
    return key not in read_metrics(folder / METRICS).evaluations


def _leave(groups: ProcessGroups, error: BaseException | None) -> None:
    if not dist.is_initialized():
        return
    if error is None:
        meet(groups.control, _MEETING, "the end of the run")
    # Where this rank ends alone the others do not come, and NCCL would wait for them.
    if error is None or (isinstance(error, RaptrError) and not error.is_of_one_rank):
        dist.destroy_process_group()
