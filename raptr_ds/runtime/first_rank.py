"""Work that one rank does for all, so that all ranks learn of its result or of its failure together."""

import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from raptr_ds.errors import RaptrError
from raptr_ds.parallel.groups import ProcessGroups

T = TypeVar("T")


def on_first_rank(groups: ProcessGroups, action: Callable[[], T]) -> T:
    """Run `action` on rank 0 alone and return its result on all ranks.

    Raises: on all ranks alike, the RaptrError of rank 0, or a RuntimeError with its traceback for any other error.
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
