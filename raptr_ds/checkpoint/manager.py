"""Checkpoints of a run: saved while training goes on, verified, and restored into any layout.

All methods but `close` are collective: all ranks call them between two steps, from the main thread. Threads that write
take part in no collective. So no rank waits for one that is elsewhere, and a slow write delays no collective: during a
write each `poll` is one small reduction.
"""

import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from raptr_ds.checkpoint.folder import (
    checkpoints_at,
    checkpoints_in,
    outdated,
    outdated_branches,
    publish,
    set_aside,
    step_folder,
    tidy,
    unfinished_folder,
)
from raptr_ds.checkpoint.manifest import (
    DamagedCheckpointError,
    Manifest,
    check_complete,
    check_model,
    file_name,
)
from raptr_ds.checkpoint.read import fill_engine, read_manifest, verify_files
from raptr_ds.checkpoint.write import RankWrite, Snapshot, Writer
from raptr_ds.config.sections import ModelSection
from raptr_ds.engine.protocol import Engine
from raptr_ds.errors import CheckpointError
from raptr_ds.parallel.agreement import on_first_rank, together
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.user_paths import is_folder, make_folder, writing

T = TypeVar("T")

_WAIT_SECONDS = 0.02


@dataclass(frozen=True)
class RestoredState:
    """What a restored run continues with. step: the number of finished steps; run_state: as it was saved."""

    step: int
    run_state: dict[str, Any]
    folder: Path


@dataclass(frozen=True)
class SaveReport:
    """How a save ended.

    error: why there is no checkpoint of this step; None on success. stop_seconds: how long training on this rank
    waited; write_seconds: how long the slowest rank wrote during training. num_bytes: written by all ranks.
    """

    step: int
    error: str | None
    stop_seconds: float
    write_seconds: float
    num_bytes: int


@dataclass
class _Pending:
    """A save that is being written. manifest: without what the ranks' writers will report."""

    writer: Writer
    manifest: Manifest
    stop_seconds: float


def check_writable(folder: Path, groups: ProcessGroups) -> None:
    """Create the checkpoint folder and check that every rank can write to it.

    Raises: PathError, StorageError or CheckpointError, on all ranks, for the first rank that cannot.
    """

    def probe() -> None:
        if not is_folder(folder):
            raise CheckpointError(
                f"rank {groups.rank} does not see {folder}, which rank 0 has created. Set raptr_ds.train.save to a "
                "folder on a file system that all nodes share."
            )
        with writing(folder):
            tempfile.TemporaryFile(dir=folder).close()

    on_first_rank(groups, lambda: make_folder(folder))
    together(groups, probe)


class Checkpoints:
    """Saves and restores the checkpoints of a run.

    folder: RUN/checkpoints. keep: the number of checkpoints to keep. report: prints messages, on rank 0 only. held, on
    rank 0: steps whose checkpoints are kept besides, until they are released.
    Raises: as `check_writable`.
    """

    def __init__(self, folder: Path, groups: ProcessGroups, keep: int, report: Callable[[str], None] = print) -> None:
        self.folder, self.groups, self.keep = folder, groups, keep
        self._report = report if groups.rank == 0 else lambda _message: None
        self._snapshot = Snapshot()
        self._pending: _Pending | None = None
        self._reports: list[SaveReport] = []
        self._newest = 0  # the step of the newest checkpoint of this run
        self.held: set[int] = set()
        self._sweeper: threading.Thread | None = None
        check_writable(self.folder, groups)
        for done in self._changed_by(lambda: tidy(self.folder)):
            self._report(f"checkpoints: {done}")

    def _changed_by(self, action: Callable[[], T]) -> T:
        """Return what an action that changes the folder returns; on the first rank. Raises: as `check_writable`."""

        def act() -> T:
            with writing(self.folder):
                return action()

        return on_first_rank(self.groups, act)

    def save(self, engine: Engine, step: int, model: ModelSection, run_state: dict[str, Any]) -> None:
        """Copy the state after `step` steps and begin to write it.

        A save that is still being written is completed first. run_state: plain JSON, of which rank 0's is written. A
        later `poll` or `wait` returns whether the checkpoint could be written.
        """
        begin = time.perf_counter()
        self._conclude_when_written()
        topology = self.groups.topology
        manifest = Manifest(
            step=step,
            model=model.model_dump(mode="json"),
            run_state=json.loads(json.dumps(run_state)),
            loss_scaler=engine.loss_scaler_state(),
            layout={"tensor": topology.tensor, "pipeline": topology.pipeline, "data": topology.data},
        )
        self._snapshot.take((f for f in engine.fragments() if engine.owns(f)), self.groups.rank)
        target = unfinished_folder(self.folder, step)
        writer = Writer(self._snapshot, target, self.groups.rank, engine.step_counts())
        self._pending = _Pending(writer, manifest, time.perf_counter() - begin)

    def poll(self) -> list[SaveReport]:
        """Complete a save if all ranks have written their part; return the saves that ended since the last call."""
        if self._pending is not None and self._all_written(self._pending):
            self._conclude(self._pending)
        reports, self._reports = self._reports, []
        return reports

    def wait(self) -> list[SaveReport]:
        """Wait for the save that is being written; return the saves that ended since the last call of `poll`."""
        self._conclude_when_written()
        if self._sweeper is not None:
            self._sweeper.join()
        return self.poll()

    def close(self) -> None:
        """Stop writing and abandon an unfinished save; not collective."""
        if self._pending is not None:
            self._pending.writer.abandon()
            self._pending = None
        if self._sweeper is not None:
            self._sweeper.join()

    def _all_written(self, pending: _Pending) -> bool:
        done = torch.tensor(int(pending.writer.is_done))
        dist.all_reduce(done, dist.ReduceOp.MIN, group=self.groups.control)
        return bool(done)

    def _conclude_when_written(self) -> None:
        if self._pending is None:
            return
        while not self._all_written(self._pending):  # not one long collective, which would time out
            time.sleep(_WAIT_SECONDS)
        self._conclude(self._pending)

    def _conclude(self, pending: _Pending) -> None:
        """Collect what all ranks have written; rank 0 makes it a checkpoint or deletes it."""
        begin = time.perf_counter()
        self._pending = None
        writes: list[Any] | None = [None] * self.groups.topology.world_size if self.groups.rank == 0 else None
        dist.gather_object(pending.writer.outcome, writes, dst=0, group=self.groups.control)
        error, num_bytes, seconds = on_first_rank(self.groups, lambda: self._finish(pending, writes or []))
        stopped = pending.stop_seconds + time.perf_counter() - begin
        step = pending.manifest.step
        self._reports.append(SaveReport(step, error, stopped, seconds, num_bytes))
        if error is not None:
            self._report(
                f"checkpoint of step {step} not written, training goes on: {error}. "
                f"raptr_ds.checkpoint.keep={self.keep} needs room for {self.keep + 1} checkpoints in {self.folder}."
            )

    def _finish(self, pending: _Pending, writes: list[RankWrite]) -> tuple[str | None, int, float]:
        """On rank 0: return (error or None, bytes, seconds). Raises: RuntimeError if a writer has failed by a bug."""
        step = pending.manifest.step
        unfinished = unfinished_folder(self.folder, step)
        failed = next((write for write in writes if write.failure is not None), None)
        error = failed.failure if failed is not None else None
        if failed is not None and failed.is_fault:
            raise RuntimeError(failed.failure)
        if failed is None:
            manifest = _completed(pending.manifest, writes)
            try:
                publish(unfinished, step_folder(self.folder, step), manifest.encode())
            except OSError as problem:
                error = f"cannot complete {unfinished}: {problem.strerror or problem}"
        if error is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
        else:
            self._newest = step
            self._delete_outdated()
        num_bytes = sum(write.file.size for write in writes if write.file is not None)
        return error, num_bytes, max(write.seconds for write in writes)

    def has(self, checkpoint: Path) -> bool:
        """Return whether a checkpoint is one of this run's, also by a link, to it or in its place."""
        return self.folder.resolve() in (checkpoint.parent.resolve(), checkpoint.resolve().parent)

    def release(self, step: int) -> None:
        """Hold a step's checkpoint no longer: delete it if newer ones have taken its place; not collective."""
        self.held.discard(step)
        if step < self._newest:
            self._delete_outdated()

    def _delete_outdated(self) -> None:
        try:
            paths = outdated(self.folder, self._newest, self.keep, self.held)
        except OSError as error:
            self._report(f"cannot delete old checkpoints in {self.folder}: {error.strerror or error}")
            return
        self._delete(paths)

    def _delete(self, paths: list[Path]) -> None:
        if self._sweeper is not None:
            self._sweeper.join()
        # Deleting many gigabytes can take seconds, so a thread does it; the next run's `tidy` deletes what is left.
        self._sweeper = threading.Thread(
            target=lambda: [shutil.rmtree(path, ignore_errors=True) for path in paths],
            name="checkpoint-sweeper",
            daemon=True,
        )
        self._sweeper.start()

    def restore(
        self,
        engine: Engine,
        where: str,
        model: ModelSection,
        not_after: int | None = None,
        check: Callable[[RestoredState], object] = lambda _: None,
    ) -> RestoredState | None:
        """Load a checkpoint into the engine; return None if the run starts anew.

        where: `auto` (the newest undamaged checkpoint of this run, if there is any), `none`, or a folder: a run's, its
        checkpoints' or one checkpoint's. not_after: the last step whose checkpoint `auto` may load; None for any.
        check: raises CheckpointError, on all ranks, for a checkpoint that the run must not continue from.
        Checkpoints of this run after the restored step are set aside. A save that is still being written is completed
        first, so that a run can roll back.
        Raises: CheckpointError, on all ranks, if the checkpoint (with `auto`, every one) is damaged, if there is none
        in the folder, or if it is of another model.
        """
        self._conclude_when_written()
        if where == "none":
            self._set_aside(after=-1)
            return None
        if where == "auto":
            candidates = on_first_rank(self.groups, lambda: checkpoints_in(self.folder, not_after))
        else:
            candidates = on_first_rank(self.groups, lambda: checkpoints_at(Path(where), of_run_file=True))[:1]
        damages = []
        for folder in candidates:
            try:
                restored = self._restore_one(engine, folder, model, check)
            except DamagedCheckpointError as damage:
                damages.append(f"{folder} is damaged: {damage}.")
                self._report(damages[-1])
                continue
            is_own = self.has(folder)
            self._newest = restored.step if is_own else 0
            self._set_aside(after=restored.step if is_own else -1, source=folder)
            return restored
        if not damages:
            return None
        fix = "Set raptr_ds.checkpoint.load to another checkpoint, or to none to start anew."
        raise CheckpointError(f"no checkpoint to continue from. {' '.join(damages)} {fix}")

    def _restore_one(
        self, engine: Engine, folder: Path, model: ModelSection, check: Callable[[RestoredState], object]
    ) -> RestoredState:
        manifest = on_first_rank(self.groups, lambda: read_manifest(folder))
        check_model(manifest, model, folder)
        restored = RestoredState(manifest.step, manifest.run_state, folder)
        check(restored)
        rank, world_size = self.groups.rank, self.groups.topology.world_size
        together(self.groups, lambda: verify_files(folder, manifest, rank, world_size))
        together(self.groups, lambda: fill_engine(engine, folder, manifest))
        engine.refresh_weights()
        return restored

    def _set_aside(self, after: int, source: Path | None = None) -> None:
        """Set the checkpoints after a step aside, and delete those set aside long before, but what was loaded."""

        def move() -> None:
            if (moved := set_aside(self.folder, after)) is None:
                return
            loaded = () if source is None else source.resolve().parents
            earlier = [branch for branch in outdated_branches(self.folder) if branch.resolve() not in loaded]
            also = f"; deleted: {', '.join(path.name for path in earlier)}" if earlier else ""
            self._report(f"checkpoints that this run does not continue from were moved to {moved}{also}")
            self._delete(earlier)

        self._changed_by(move)


def _completed(manifest: Manifest, writes: list[RankWrite]) -> Manifest:
    """Return the manifest with what the writers of all ranks have reported."""
    entries = tuple(entry for write in writes for entry in write.entries)
    check_complete(entries)
    return replace(
        manifest,
        step_counts={name: count for write in writes for name, count in write.step_counts.items()},
        files={file_name(rank): write.file for rank, write in enumerate(writes) if write.file is not None},
        entries=entries,
    )
