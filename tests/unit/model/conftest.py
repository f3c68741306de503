"""A group of one process, which the parallel layers need, and small models on it."""

from collections.abc import Iterator

import pytest

from raptr_ds.parallel.groups import ProcessGroups, lone_process_groups


@pytest.fixture(scope="module")
def groups() -> Iterator[ProcessGroups]:
    """The process groups of a lone process, on the CPU."""
    with lone_process_groups() as lone:
        yield lone
