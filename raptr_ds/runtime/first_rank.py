"""Doing something that may fail, so that all ranks learn of a failure together and none is left in a collective."""

import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from raptr_ds.errors import RaptrError
from raptr_ds.parallel.groups import ProcessGroups

T = TypeVar("T")


def on_all_ranks(groups: ProcessGroups, action: Callable[[], T]) -> list[T]:
    """Run `action` on every rank and return all results, by rank.

    Raises: on all ranks alike, what the first failing rank raised (a RaptrError as it is, anything else as a
    RuntimeError with the rank and its traceback).
    """
    value, failure = _attempt(action, groups.rank)
    outcomes: list[Any] = [None] * groups.topology.world_size
    dist.all_gather_object(outcomes, (value, failure), group=groups.control)
    for _, failed in outcomes:
        _raise(failed)
    return [value for value, _ in outcomes]


def on_first_rank(groups: ProcessGroups, action: Callable[[], T]) -> T:
    """Run `action` on rank 0 alone and return its result, or raise its error, on all ranks."""
    outcome = [_attempt(action, groups.rank) if groups.rank == 0 else None]
    dist.broadcast_object_list(outcome, src=0, group=groups.control)
    assert outcome[0] is not None
    value, failure = outcome[0]
    _raise(failure)
    return value  # type: ignore[return-value]


def _attempt(action: Callable[[], T], rank: int) -> tuple[T | None, tuple[type[RaptrError] | None, str] | None]:
    try:
        return action(), None
    except RaptrError as error:
        return None, (type(error), str(error))
    except Exception:
        return None, (None, f"rank {rank} failed:\n{traceback.format_exc()}")


def _raise(failure: tuple[type[RaptrError] | None, str] | None) -> None:
    if failure is not None:
        kind, message = failure
        raise (kind or RuntimeError)(message)
