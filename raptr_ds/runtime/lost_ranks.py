"""A rank that ends alone: its error is printed once, and the ranks that lose their connection to it end as it does."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist

from raptr_ds.errors import FIRST_WORD_SECONDS, Exit, LostRankError, RaptrError

# gloo's and the store's words for a closed socket, and NCCL's for a process that is gone (torch has no class for them).
_SIGNS = ("Connection reset by peer", "Connection closed by peer", "Broken pipe", "likely closed", "ncclRemoteError")
_RANKS, _CODE = "raptr_ds/ended_alone/ranks", "raptr_ds/ended_alone/code"
_INFORMED = "raptr_ds/ended_alone/informed"  # how many ranks need nothing more of the store


@contextmanager
def lost_ranks_explained() -> Iterator[None]:
    """Turn an error of a connection that another rank has closed into LostRankError.

    Where that rank has left its exit code it has printed why it ended: this one takes the code and prints nothing.
    """
    try:
        yield
    except RuntimeError as error:  # torch.distributed's errors are
        code = _code_of_another_rank()
        if code is None and not any(sign in str(error) for sign in _SIGNS):
            raise
        reason = str(error).strip().partition("\n")[0]
        lost = LostRankError(
            "a connection to another rank broke: that rank has ended, or its host cannot be reached. Why it ended "
            f"is in its own output, or in the launcher's ({reason})"
        )
        if code is not None:
            lost.exit_code, lost.is_first = code, False
        raise lost from error


@contextmanager
def ending_alone() -> Iterator[None]:
    """Have an error that some ranks alone may raise in the block printed by the first of them."""
    try:
        yield
    except RaptrError as error:
        mark_as_alone(error)
        raise


def mark_as_alone(error: RaptrError) -> None:
    """Leave the exit code of an error that not all ranks raise to those that will miss this one."""
    error.is_of_one_rank, error.is_first = True, False
    store = _store()
    try:
        store.set(_CODE, str(int(error.exit_code)))
        error.is_first = store.add(_RANKS, 1) == 1
        store.add(_INFORMED, 1)
    except RuntimeError:  # rank 0, which keeps it, is gone: the run has ended, for a reason that it has printed
        return


def disconnect() -> None:
    """Leave torch.distributed. Rank 0, where the store may be, stays until all know of an error that some ranks met.

    For ranks without collectives under way, for which gloo would wait. The others learn of it by their connection.
    """
    rank, world_size, store = dist.get_rank(), dist.get_world_size(), _store()
    dist.destroy_process_group()
    if rank:
        return
    with suppress(RuntimeError):
        until = time.monotonic() + FIRST_WORD_SECONDS  # those that print nothing stay longer
        while store.check([_CODE]) and store.add(_INFORMED, 0) < world_size and time.monotonic() < until:
            time.sleep(0.01)


def _code_of_another_rank() -> Exit | None:
    if not dist.is_initialized():
        return None
    store = _store()
    try:
        if not store.check([_CODE]):
            return None
        code = Exit(int(store.get(_CODE)))
        store.add(_INFORMED, 1)
    except RuntimeError:
        return None
    return code


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()
