"""Importing libraries whose functions torch.compile decorates, without what that loads.

The decorator loads torch's inductor when a module is imported, 2 s of CPU in every process, whoever calls the function.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def without_compiler() -> Iterator[None]:
    """Leave functions that are decorated meanwhile as they are."""

    def leave(function: Callable[..., Any] | None = None, **_: Any) -> Any:
        return leave if function is None else function

    compiler = torch.compile
    torch.compile = leave  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiler
