"""Distributed tests on gloo: each case in processes of its own, forked from one that has imported everything.

Importing torch, DeepSpeed and megatron-core costs 5 s of CPU, so it is done once; a fork takes a few hundredths of a
second, and leaves nothing of a case to the next one (module globals, hooks, the threads of dozens of gloo groups).
"""

import importlib
import multiprocessing as mp
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from raptr_ds.parallel.launch import free_port

MAX_WORKERS = 4

_CONTEXT = mp.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.dist.imported"])


class WorkerError(AssertionError):
    """A worker raised, died or hung; carries the failing rank's traceback."""


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Run function(launch, *args) on ranks 0..world_size-1, each a process, and return their results, by rank.

    Raises: WorkerError with the first failing rank's traceback, or the ranks that hung.
    """
    assert 1 <= world_size <= MAX_WORKERS
    port = free_port()
    processes, ranks = [], {}
    try:
        for rank in range(world_size):
            ours, theirs = _CONTEXT.Pipe()
            task = (theirs, function.__module__, function.__name__, rank, world_size, port, args)
            process = _CONTEXT.Process(target=_run_case, args=task, daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            ranks[ours] = rank
        return _results(ranks, function.__name__, timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()
        for pipe in ranks:
            pipe.close()


def _results(ranks: dict[Connection, int], name: str, timeout: float) -> list[Any]:
    results: list[Any] = [None] * len(ranks)
    waiting = dict(ranks)
    deadline = time.monotonic() + timeout
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            hung = sorted(waiting.values())
            raise WorkerError(f"ranks {hung} of {len(ranks)} did not finish {name} in {timeout} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            try:
                done, value = pipe.recv()
            except EOFError:
                done, value = False, "the process died"
            if not done:
                raise WorkerError(f"rank {rank} of {len(ranks)} failed in {name}:\n{value}")
            results[rank] = value
    return results


def _run_case(
    pipe: Connection, module: str, name: str, rank: int, world_size: int, port: int, args: tuple[Any, ...]
) -> None:
    from raptr_ds.parallel.launch import Launch

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        launch = Launch(rank, rank, world_size, "127.0.0.1", port, "tests")
        pipe.send((True, getattr(importlib.import_module(module), name)(launch, *args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    pipe.poll(None)  # until the test has what it needs of all ranks, and kills them
