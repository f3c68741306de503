"""Agreement: all ranks train the same path in a step, stop at the same step and fail together."""

import hashlib
import queue
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from raptr_ds.errors import AgreementError, RaptrError
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.parallel.roll_call import listed
from raptr_ds.paths.path import LayerPath

T = TypeVar("T")


@dataclass(frozen=True)
class Agreed:
    """What all ranks will do in a step: the path that they train, and whether to stop before it.

    reports: what each rank passed on with the request of this step, (world size, num_reported).
    """

    path: LayerPath
    stop: bool
    reports: np.ndarray


class PathAgreement:
    """Broadcasts a digest of rank 0's path of each step and has every rank check it against its own.

    Paths are pure functions of (seed, step), so a difference means that ranks run different code, configuration or
    libraries; training on would mix up gradient buckets without an error. The exchange for step n + 1 runs in a thread
    on a gloo group of its own while step n trains, so that it costs the step nothing.
    """

    def __init__(
        self,
        groups: ProcessGroups,
        path_at: Callable[[int], LayerPath],
        stop_requested: Callable[[], bool],
        num_steps: int,
        num_reported: int = 0,
    ) -> None:
        """path_at: this rank's own path of a 0-based step. num_reported: numbers each rank passes on with a step."""
        self._num_reported = num_reported
        self._rank, self._world_size = groups.rank, groups.topology.world_size
        self._path_at, self._stop_requested, self._num_steps = path_at, stop_requested, num_steps
        self._group = dist.new_group(backend="gloo")
        self._wanted: queue.SimpleQueue[tuple[Future[Agreed], int, Sequence[float]]] = queue.SimpleQueue()
        self._under_way: tuple[int, Future[Agreed]] | None = None
        # A daemon: a rank that leaves must not wait for an exchange whose other side is gone.
        threading.Thread(target=self._serve, name="path-agreement", daemon=True).start()

    def at(self, step: int, report: Sequence[float] = ()) -> Agreed:
        """Return what was agreed for `step` (0-based), and start on the next one.

        report: numbers that all ranks get with what is agreed for the next step, zeros if left out.
        Raises: AgreementError, on every rank, naming the step and the ranks whose path differs.
        """
        under_way, exchange = self._under_way or self._begin(step, ())
        self._under_way = None
        assert under_way == step, f"agreement on step {under_way} is under way, not on {step}"
        agreed = exchange.result()
        if step + 1 < self._num_steps and not agreed.stop:
            self._under_way = self._begin(step + 1, report)
        return agreed

    def restart(self) -> None:
        """Drop the exchange under way, so that any step may come next; every rank calls it between two steps.

        The exchange is waited for, so that no rank is left alone in it. A stop request that it found is not lost: its
        rank repeats it at the next step.
        Raises: what that exchange raised.
        """
        if self._under_way is not None:
            (_, exchange), self._under_way = self._under_way, None
            exchange.result()

    def _begin(self, step: int, report: Sequence[float]) -> tuple[int, Future[Agreed]]:
        exchange: Future[Agreed] = Future()
        self._wanted.put((exchange, step, report))
        return step, exchange

    def _serve(self) -> None:
        while True:
            exchange, step, report = self._wanted.get()
            try:
                exchange.set_result(self._agree(step, report))
            except Exception as error:  # handed to the loop, which raises it
                exchange.set_exception(error)

    def _agree(self, step: int, report: Sequence[float]) -> Agreed:
        path = self._path_at(step)
        own = torch.tensor(list(hashlib.sha256(f"{step} {path!r}".encode()).digest()))
        leader = own.clone()
        dist.broadcast(leader, src=0, group=self._group)
        # A row for each rank: whether its path differs, whether it asks to stop, its report.
        table = np.zeros((self._world_size, 2 + self._num_reported))
        table[self._rank, :2] = not torch.equal(own, leader), self._stop_requested()
        table[self._rank, 2:] = report or 0.0
        dist.all_reduce(torch.from_numpy(table), group=self._group)
        differing = table[:, 0].nonzero()[0].tolist()
        if differing:
            raise AgreementError(
                f"step {step + 1}: rank(s) {listed(differing)} would train another path than rank 0. "
                "All ranks must run the same code, run file, seed and library versions. Compare them on these ranks; "
                "nothing of this step has been trained."
            )
        return Agreed(path, bool(table[:, 1].any()), table[:, 2:])


def gathered(value: T, group: dist.ProcessGroup) -> list[T]:
    """Return the value of each rank of the group, in their order. Collective: all of them call it."""
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def together(groups: ProcessGroups, action: Callable[[], T]) -> T:
    """Run `action` on every rank and return its result; if it fails anywhere for a user's reason, fail everywhere.

    Raises: the RaptrError of the lowest failing rank, on all ranks, so that none waits for one that is gone.
    """
    result, error = None, None
    try:
        result = action()
    except RaptrError as caught:
        error = caught
    first = next((found for found in gathered(error, groups.control) if found is not None), None)
    if first is not None:
        raise first
    return result  # type: ignore[return-value]


def on_first_rank(groups: ProcessGroups, action: Callable[[], T]) -> T:
    """Run `action` on rank 0 alone and return its result on all ranks.

    Raises: on every rank, the RaptrError of rank 0, or a RuntimeError with its traceback for any other error.
    """
    outcome: list[Any] = [None, None]
    if groups.rank == 0:
        try:
            outcome[0] = action()
        except RaptrError as error:
            outcome[1] = error
        except Exception:
            outcome[1] = RuntimeError(f"rank 0 failed:\n{traceback.format_exc()}")
    dist.broadcast_object_list(outcome, src=0, group=groups.control)
    value, error = outcome
    if error is not None:
        raise error
    return value
