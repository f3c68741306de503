"""A group of one process, which the parallel layers need, and small models on it."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from raptr_ds.parallel.groups import ProcessGroups, make_process_groups
from raptr_ds.parallel.topology import Topology


@pytest.fixture(scope="module")
def groups() -> Iterator[ProcessGroups]:
    """The process groups of a lone process, on the CPU."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield make_process_groups(Topology(1, 1, 1), 0, torch.device("cpu"))
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
