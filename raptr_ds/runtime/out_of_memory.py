"""Out of memory: one message, with the plan's figures and what would help, and no rank left waiting for another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from raptr_ds.config.run import RunConfig
from raptr_ds.errors import DeviceMemoryError, Exit
from raptr_ds.runtime.lost_ranks import mark_as_alone
from raptr_ds.runtime.planner_process import PlannerError, ask_planner

if TYPE_CHECKING:  # the planner's process need not wait for megatron-core's import
    from raptr_ds.parallel.groups import ProcessGroups

# What is beside torch's allocator on GPUs (cuBLAS, NCCL, the driver, its allocator on CPUs) raises no class of its own.
_HOST_SIGN = "DefaultCPUAllocator: can't allocate memory"
_SIGNS = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", _HOST_SIGN)


@dataclass(frozen=True)
class DeviceMemory:
    """A GPU's memory in bytes. allocated: tensors of this process; reserved: what torch holds for them."""

    name: str
    total: int
    allocated: int = 0
    reserved: int = 0

    @classmethod
    def of(cls, device: torch.device) -> DeviceMemory | None:
        """Return that of a device, None for a CPU, whose memory is shared with whatever else runs."""
        if device.type != "cuda":
            return None
        properties = torch.cuda.get_device_properties(device)
        allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        return cls(properties.name, properties.total_memory, allocated, reserved)


@contextmanager
def memory_errors_explained(
    config: RunConfig, groups: ProcessGroups, steps_trained: Callable[[], int]
) -> Iterator[None]:
    """Turn an error of a device without free memory into DeviceMemoryError, on the rank that has it.

    steps_trained: by this process so far.
    Raises: DeviceMemoryError.
    """
    try:
        yield
    except RuntimeError as error:  # torch's OutOfMemoryError is one
        if not is_out_of_memory(error):
            raise
        raise _explained(config, groups, steps_trained(), error) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
    )


def planned_need(config: RunConfig, stage: int, num_processes: int, device: DeviceMemory | None) -> list[str]:
    """Return what a rank of a pipeline stage needs by the memory plan, and what would help: the planner's lines.

    The planner runs in a process of its own that sees no GPU. device: None for a CPU. If it fails or takes more than a
    minute, there is one line instead, with the command to run by hand.
    """
    arguments = ["--stage", str(stage), "--processes", str(num_processes)]
    if device is not None:
        arguments += ["--gpu", device.name, *map(str, (device.total, device.allocated, device.reserved))]
    try:
        return ask_planner("raptr_ds.planner.shortage", arguments, config).splitlines()
    except PlannerError:
        return [
            f"`python tools/plan.py RUN_FILE --processes {num_processes}`, with the same --set, prints how much memory "
            "a rank needs."
        ]


def _explained(config: RunConfig, groups: ProcessGroups, trained: int, error: RuntimeError) -> DeviceMemoryError:
    when = f"after {trained} steps of this start" if trained else "before the end of the first step: nothing is trained"
    reason = str(error).strip().splitlines()[0]
    if groups.device.type == "cuda" and _HOST_SIGN in reason:
        lines = [
            f"rank {groups.rank}'s machine, not its GPU, ran out of memory {when}. {reason}",
            "Give the job more memory (Slurm: --mem), or start fewer processes on a machine.",
        ]
    else:
        lines = [
            f"rank {groups.rank} ({groups.device}) ran out of memory {when}. {reason}",
            *planned_need(config, groups.pipeline_rank, groups.topology.world_size, DeviceMemory.of(groups.device)),
        ]
    if trained:
        lines.append("With a change that fits, start it again: the run goes on from its newest checkpoint, if any.")
    explained = DeviceMemoryError("\n".join(lines))
    explained.exit_code = Exit.FAULT if trained else Exit.USER_ERROR
    mark_as_alone(explained)
    return explained
