"""Which ranks of a run have started, and on which devices: checked before the first collective, which would hang."""

import json
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from raptr_ds.errors import AbsentRankError, ConfigError, LostRankError
from raptr_ds.parallel.launch import Launch

_KEY, _DONE = "raptr_ds/rank/{}", "raptr_ds/done/{}"
_REFUSAL_TIMEOUT = timedelta(minutes=1)
_TIMED_OUT = 0.9  # of a timeout: what fails sooner has not waited for it


@dataclass(frozen=True)
class RankDevice:
    """What a rank trains on. gpu: its identity, the same for all processes on all machines; None for a CPU.

    refusal: why this rank cannot train at all; empty if it can.
    """

    gpu: str | None
    has_nccl: bool
    refusal: str = ""

    @staticmethod
    def of(device: torch.device) -> "RankDevice":
        """Describe this rank's device."""
        gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
        return RankDevice(gpu, dist.is_nccl_available())


def call_roll(launch: Launch, device: RankDevice, timeout: timedelta) -> Store:
    """Return the launch's store after every rank has written its device there, and the devices fit together.

    Raises: AbsentRankError, naming the ranks that did not come within `timeout`; ConfigError, on every rank.
    """
    store = _open_store(launch, timeout)
    keys = [_KEY.format(rank) for rank in range(launch.world_size)]
    try:
        store.set(keys[launch.rank], json.dumps(asdict(device)))
        store.wait(keys, timeout)
        devices = [RankDevice(**json.loads(value)) for value in store.multi_get(keys)]
    except dist.DistError as error:
        raise AbsentRankError(_who_is_missing(store, keys, timeout)) from error
    if problem := device_problem(devices):
        # Rank 0's process, and the store in it, stay until every rank has read what it needs to come to the same end.
        ends = [_DONE.format(rank) for rank in range(launch.world_size)]
        store.set(ends[launch.rank], "")
        if launch.rank == 0:
            store.wait(ends, timeout)
        raise ConfigError(problem)
    return store


def refuse(launch: Launch, reason: str) -> None:
    """Answer the roll call with why this rank cannot train, and return when rank 0 has read it, or does not come.

    Every rank's call_roll then ends with this reason, which rank 0 prints.
    """
    with suppress(dist.DistError, AbsentRankError):
        store = _open_store(launch, _REFUSAL_TIMEOUT)
        answer = RankDevice(gpu=None, has_nccl=False, refusal=f"on {socket.gethostname()}: {reason}")
        store.set(_DONE.format(launch.rank), "")
        store.set(_KEY.format(launch.rank), json.dumps(asdict(answer)))
        store.wait([_DONE.format(0)], _REFUSAL_TIMEOUT)


def device_problem(devices: Sequence[RankDevice]) -> str | None:
    """Return what is wrong with the devices of a run's ranks, and the alternative; None if nothing."""
    if refusing := [rank for rank, device in enumerate(devices) if device.refusal]:
        return f"ranks {listed(refusing)} of {len(devices)} cannot train; {devices[refusing[0]].refusal}"
    without_gpu = [rank for rank, device in enumerate(devices) if device.gpu is None]
    if len(without_gpu) == len(devices):
        return None
    if without_gpu:
        return (
            f"ranks {listed(without_gpu)} of {len(devices)} have no GPU, and the others have one. Give every process "
            "a GPU, or set CUDA_VISIBLE_DEVICES to nothing to train on CPUs."
        )
    without_nccl = [rank for rank, device in enumerate(devices) if not device.has_nccl]
    if without_nccl:
        return (
            f"the torch of ranks {listed(without_nccl)} of {len(devices)} has no NCCL, by which GPUs communicate. "
            "Install a torch that has it (all of Linux's CUDA builds), or set CUDA_VISIBLE_DEVICES to nothing to "
            "train on CPUs."
        )
    for gpu in dict.fromkeys(device.gpu for device in devices):
        sharing = [rank for rank, device in enumerate(devices) if device.gpu == gpu]
        if len(sharing) > 1:
            return (
                f"ranks {listed(sharing)} of {len(devices)} share one GPU ({gpu}), and NCCL needs one for each. Start "
                "as many processes on a machine as it has GPUs, or set CUDA_VISIBLE_DEVICES to nothing to train on "
                "CPUs."
            )
    return None


def meet(group: dist.ProcessGroup, timeout: timedelta, where: str) -> None:
    """Wait for all ranks of a gloo group to come here.

    Raises: AbsentRankError, on rank 0 naming those that do not; LostRankError where one has ended on its way.
    """
    began, seconds = time.monotonic(), timeout.total_seconds()
    try:
        dist.monitored_barrier(group, timeout, wait_all_ranks=True)
    except RuntimeError as error:
        if time.monotonic() - began < _TIMED_OUT * seconds:  # a connection broke, whatever torch's text for rank 0
            raise LostRankError(f"a rank has ended, or its host cannot be reached, before {where}: {error}") from error
        raise AbsentRankError(f"not every rank came to {where} within {seconds:g} s: {error}") from error


def _open_store(launch: Launch, timeout: timedelta) -> Store:
    try:
        store = TCPStore(
            launch.master_addr,
            launch.master_port,
            launch.world_size,
            is_master=launch.rank == 0 and launch.store_attempt is None,
            timeout=timeout,
            wait_for_workers=False,  # the roll call waits, and knows who is missing
            multi_tenant=True,
        )
    except dist.DistNetworkError as error:
        if launch.rank == 0:
            raise
        raise AbsentRankError(
            f"rank {launch.rank} found nobody at {launch.master_addr}:{launch.master_port} within "
            f"{timeout.total_seconds():g} s, where rank 0 should be ({error})"
        ) from error
    return PrefixStore(f"attempt_{launch.store_attempt or 0}", store)


def _who_is_missing(store: Store, keys: Sequence[str], timeout: timedelta) -> str:
    within = f"within {timeout.total_seconds():g} s"
    try:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
    except dist.DistError:
        return f"rank 0, which keeps the list of ranks, was gone before all {len(keys)} had come {within}"
    return (
        f"ranks {listed(missing)} of {len(keys)} did not come {within}. Look at their machines and logs; every "
        "process needs the same world size, address and port"
    )


def listed(ranks: Sequence[int]) -> str:
    """Return ranks for a message: the first 16, and how many there are."""
    shown = ", ".join(map(str, ranks[:16]))
    return shown if len(ranks) <= 16 else f"{shown}, ... ({len(ranks)} in all)"
