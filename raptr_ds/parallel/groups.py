"""The process groups of a run, made once, as one value that is handed to whoever communicates."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from raptr_ds.parallel.launch import Launch, use_gpu
from raptr_ds.parallel.megatron_core import parallel_state
from raptr_ds.parallel.roll_call import RankDevice, call_roll, meet
from raptr_ds.parallel.topology import Topology


@dataclass(frozen=True)
class ProcessGroups:
    """Groups this rank belongs to and its place in each.

    `tensor`, `data` and `pipeline` are the mesh's axes; `embedding` joins the first and the last pipeline stage where
    the tied embedding has a copy on each, and is None elsewhere; `control` is a gloo group of all ranks for small
    host-side messages. sequence_parallel: the residual stream is split along the sequence over `tensor`
    (parallel/sequence.py).
    """

    topology: Topology
    rank: int
    pipeline_rank: int
    data_rank: int
    tensor_rank: int
    device: torch.device
    world: dist.ProcessGroup
    tensor: dist.ProcessGroup
    data: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    embedding: dist.ProcessGroup | None
    control: dist.ProcessGroup
    sequence_parallel: bool = False

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the head."""
        return self.pipeline_rank == self.topology.pipeline - 1

    @property
    def sequence_rank(self) -> int:
        """Which part of each sequence this rank's residual stream is; 0 where it is whole."""
        return self.tensor_rank if self.sequence_parallel else 0


def local_device(launch: Launch) -> torch.device:
    """Return this rank's accelerator, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", launch.local_rank % torch.cuda.device_count())


def initialize_process_groups(
    launch: Launch,
    tensor: int,
    pipeline: int,
    timeout: timedelta = timedelta(minutes=30),
    sequence_parallel: bool = False,
) -> ProcessGroups:
    """Start torch.distributed and megatron-core's groups for this launch, and the communicators between all ranks.

    timeout: of each step of the start, and of every collective on these groups afterwards, in whole minutes.

    Raises: ConfigError if the ranks' devices do not fit together;
    AbsentRankError if a rank does not come; LostRankError if one ends meanwhile.
    """
    topology = Topology.of(launch.world_size, tensor, pipeline)
    device = local_device(launch)
    if device.index is not None:
        torch.cuda.set_device(device)
        use_gpu(device.index)  # not the rank on the machine where a launcher lets each process see its own GPU only
    if not dist.is_initialized():
        store = call_roll(launch, RankDevice.of(device), timeout)
        # All of NCCL's settings that a run needs; torch's own defaults end a process whose collective hangs or fails.
        # A bound device makes torch split the groups' communicators from one, made now, and not guess the device. A
        # lone rank has none to split, and binding it fails on some single GPUs (deepspeed/comm/torch.py, issue 8248).
        dist.init_process_group(
            backend="nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timeout,
            device_id=device if device.type == "cuda" and launch.world_size > 1 else None,
        )
    groups = make_process_groups(topology, launch.rank, device, timeout, sequence_parallel)
    warm_up(groups, timeout)
    return groups


def make_process_groups(
    topology: Topology,
    rank: int,
    device: torch.device,
    timeout: timedelta = timedelta(minutes=30),
    sequence_parallel: bool = False,
) -> ProcessGroups:
    """Make the groups of `topology` in an initialized torch.distributed; every rank calls it with equal arguments."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=topology.tensor,
        pipeline_model_parallel_size=topology.pipeline,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=max(1, round(timeout.total_seconds() / 60)),
    )
    pipeline_rank, data_rank, tensor_rank = topology.coordinates(rank)
    tied_across_stages = topology.pipeline > 1 and pipeline_rank in (0, topology.pipeline - 1)
    return ProcessGroups(
        topology=topology,
        rank=rank,
        pipeline_rank=pipeline_rank,
        data_rank=data_rank,
        tensor_rank=tensor_rank,
        device=device,
        world=_made(dist.group.WORLD),
        tensor=_made(parallel_state.get_tensor_model_parallel_group()),
        data=_made(parallel_state.get_data_parallel_group()),
        pipeline=_made(parallel_state.get_pipeline_model_parallel_group()),
        embedding=parallel_state.get_embedding_group() if tied_across_stages else None,
        control=dist.new_group(backend="gloo", timeout=timeout),
        sequence_parallel=sequence_parallel,
    )


def warm_up(groups: ProcessGroups, timeout: timedelta) -> None:
    """Make every communicator of the run work once, so that a rank or a network that does not is found before step 0.

    All ranks go through the kinds of groups in one order, and groups of a kind share no rank: none waits in a circle.

    Raises: AbsentRankError, LostRankError.
    """
    if groups.topology.world_size == 1:
        return
    meet(groups.control, timeout, "the first collective")
    for group in (groups.world, groups.tensor, groups.data, groups.pipeline, groups.embedding):
        if group is not None and group.size() > 1:
            dist.all_reduce(torch.zeros(1, device=groups.device), group=group)
    if groups.device.type == "cuda":
        torch.cuda.synchronize(groups.device)
    meet(groups.control, timeout, "the end of the first collective on every group")


def timeout_of_the_world() -> timedelta:
    """Return how long a collective of all ranks waits."""
    world: Any = _made(dist.group.WORLD)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return world._get_backend(torch.device(device)).options._timeout


def launch_store() -> Store:
    """Return the store by which the ranks of this launch have met."""
    return dist.distributed_c10d._get_default_store()


@contextmanager
def lone_process_groups() -> Iterator[ProcessGroups]:
    """Hold the groups of this process alone, on the CPU, for work that needs a model and no launcher."""
    store: Any = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield make_process_groups(Topology(1, 1, 1), 0, torch.device("cpu"))
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _made(group: object) -> dist.ProcessGroup:
    assert isinstance(group, dist.ProcessGroup), group
    return group
