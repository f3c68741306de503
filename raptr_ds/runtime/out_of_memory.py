"""Out of memory: one message, with the plan's figures and what would help, and no rank left waiting for another."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from raptr_ds.config.load import RunConfig
from raptr_ds.errors import DeviceMemoryError, Exit
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.planner.shortage import DeviceMemory, explanation

# Libraries beside torch's allocator (cuBLAS, NCCL, the driver) raise no class of their own.
_SIGNS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_RANKS, _CODE = "raptr_ds/out_of_memory/ranks", "raptr_ds/out_of_memory/code"


@contextmanager
def memory_errors_explained(
    config: RunConfig, groups: ProcessGroups, steps_trained: Callable[[], int]
) -> Iterator[None]:
    """Turn a device's want of memory into DeviceMemoryError, on the rank that has it.

    The other ranks wait in a collective then, which their launcher ends when this one exits; where they notice that a
    rank is gone (gloo), they end as it did, in silence. steps_trained: by this process so far.
    Raises: DeviceMemoryError.
    """
    try:
        yield
    except RuntimeError as error:  # torch's OutOfMemoryError is one
        if is_out_of_memory(error):
            raise _explained(config, groups, steps_trained(), error) from error
        if (code := _code_of_another_rank()) is not None:
            raise DeviceMemoryError("another rank ran out of memory", code, is_first=False) from error
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
    )


def _explained(config: RunConfig, groups: ProcessGroups, trained: int, error: RuntimeError) -> DeviceMemoryError:
    code = Exit.FAULT if trained else Exit.USER_ERROR
    when = f"after {trained} steps of this start" if trained else "before the end of the first step: nothing is trained"
    after = (
        ["With a change that fits, start it again: the run goes on from its newest checkpoint, if it has one."]
        if trained
        else []
    )
    lines = [
        f"rank {groups.rank} ({groups.device}) ran out of memory {when}. {str(error).strip().splitlines()[0]}",
        *explanation(config, groups.pipeline_rank, DeviceMemory.of(groups.device)),
        *after,
    ]
    return DeviceMemoryError("\n".join(lines), code, is_first=_tell_the_others(code))


def _tell_the_others(code: Exit) -> bool:
    """Leave word for ranks that will miss this one; return whether it is the first to have no memory left."""
    store = _store()
    try:
        store.set(_CODE, str(int(code)))
        return store.add(_RANKS, 1) == 1
    except RuntimeError:  # rank 0, which keeps it, is gone: the run has ended, for a reason that it has printed
        return False


def _code_of_another_rank() -> Exit | None:
    store = _store()
    try:
        return Exit(int(store.get(_CODE))) if store.check([_CODE]) else None
    except RuntimeError:
        return None


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()
