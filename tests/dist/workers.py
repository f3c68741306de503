"""Distributed tests on gloo: one pool of worker processes that import torch and DeepSpeed once and run case after case.

Importing costs 5 s of CPU in each process, so a fresh spawn per case would be most of the suite's time. After a failure
or a timeout the pool is killed, by process id, and the next case gets a fresh one.
"""

import gc
import importlib
import multiprocessing as mp
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

MAX_WORKERS = 4
MAX_THREADS = 150  # pipeline and ZeRO 3 engines leave theirs behind; a worker with more than these is replaced


class WorkerError(AssertionError):
    """A worker raised, died or hung; carries the failing rank's traceback."""


def free_port() -> int:
    """Return a TCP port that is free on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(inbox: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    from raptr_ds.parallel.launch import prepare_imports

    prepare_imports(has_gpu=False)
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # a third of a million objects of imported libraries, which every case's collections would go through
    while True:
        try:
            module, name, rank, world_size, port, args = inbox.recv()
        except EOFError:
            return
        try:
            result = _run_case(module, name, rank, world_size, port, args)
            inbox.send(("done", (result, len(list(Path("/proc/self/task").iterdir())))))
        except BaseException:
            inbox.send(("failed", traceback.format_exc()))


def _run_case(module: str, name: str, rank: int, world_size: int, port: int, args: tuple[Any, ...]) -> Any:
    import torch.distributed as dist
    import torch.nn.functional as torch_functional
    from deepspeed.comm import comm as deepspeed_comm
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import groups as deepspeed_groups
    from megatron.core import parallel_state

    from raptr_ds.parallel.launch import Launch

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    launch = Launch(rank, rank, world_size, "127.0.0.1", port, "tests")
    linear = torch_functional.linear
    try:
        return getattr(importlib.import_module(module), name)(launch, *args)
    finally:
        # ZeRO 3 replaces it for the whole process (runtime/zero/partition_parameters.py). In a process where it is
        # replaced gradients arrive in another order, and ZeRO 2 reduces them by order: ranks that served different
        # cases would add up different parameters.
        torch_functional.linear = linear
        _forget_engines()
        # Leave nothing of this case's groups to the next: DeepSpeed and megatron-core keep them in module globals.
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()
        deepspeed_comm.cdb = None
        importlib.reload(deepspeed_groups)
        # ZeRO 3 compares its running numbers of modules and parameters between ranks; workers have served other cases.
        DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
        Init.param_id = 0
        gc.collect()


def _forget_engines() -> None:
    """Let go of the case's engines.

    ZeRO's gradient hooks hold their engine in a cycle that goes through autograd's C++ side, which Python cannot
    collect; an engine that stays keeps the threads of a dozen gloo groups, and hundreds of those slow everything down.
    """
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    kinds = (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3)
    optimizers = [found for found in gc.get_objects() if issubclass(type(found), kinds)]
    while optimizers:
        for hook in optimizers.pop()._grad_acc_hooks:
            hook.remove()


class Pool:
    """MAX_WORKERS processes, started when first needed."""

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
        """Run function(launch, *args) on ranks 0..world_size-1 and return their results, by rank.

        Raises: WorkerError with the first failing rank's traceback, or the ranks that hung.
        """
        self._start(world_size)
        port = free_port()
        waiting = {}
        for rank, (_, pipe) in enumerate(self._workers[:world_size]):
            pipe.send((function.__module__, function.__name__, rank, world_size, port, args))
            waiting[pipe] = rank
        results: list[Any] = [None] * world_size
        deadline = time.monotonic() + timeout
        tired = False
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                hung = sorted(waiting.values())
                self.kill()
                raise WorkerError(f"ranks {hung} of {world_size} did not finish {function.__name__} in {timeout} s")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    state, value = pipe.recv()
                except EOFError:
                    state, value = "failed", "the process died"
                if state == "failed":
                    self.kill()
                    raise WorkerError(f"rank {rank} of {world_size} failed in {function.__name__}:\n{value}")
                results[rank], threads = value
                tired = tired or threads > MAX_THREADS
        if tired:
            self.kill()
        return results

    def _start(self, count: int) -> None:
        context = mp.get_context("spawn")
        while len(self._workers) < count:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def kill(self) -> None:
        """Kill all workers."""
        for process, pipe in self._workers:
            process.kill()
            process.join()
            pipe.close()
        self._workers = []


POOL = Pool()


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Run function(launch, *args) on `world_size` processes of the session's pool; see Pool.run."""
    assert 1 <= world_size <= MAX_WORKERS
    return POOL.run(function, world_size, *args, timeout=timeout)
