"""The cost model's Device, measured by processes that this module starts; it imports little, so they start fast."""

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from torch.multiprocessing.spawn import spawn

from raptr_ds.config.run import RunConfig
from raptr_ds.parallel.launch import Launch, free_port, prepare_imports
from raptr_ds.planner.step_time import Device
from raptr_ds.runtime.host_memory import keep_freed_memory

_WARMUP, _REPETITIONS = 2, 7


def measure_this_machine(config: RunConfig, num_processes: int, device: Device) -> Device:
    """Return `device` with the speeds that this machine reaches on the run's shapes; those between machines stay.

    num_processes: of the run, of which as many are started as there are GPUs here, or cores where there is none.
    config: with the vocabulary's size.
    """
    count = min(num_processes, torch.cuda.device_count() or os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "device.json"
        spawn(_rank, (count, free_port(), config, device, found), nprocs=count)
        return Device(**json.loads(found.read_text(encoding="utf-8")))


def _rank(rank: int, count: int, port: int, config: RunConfig, device: Device, found: Path) -> None:
    has_gpu = torch.cuda.is_available()
    prepare_imports(has_gpu)
    if not has_gpu:
        keep_freed_memory()
    import torch.distributed as dist

    from raptr_ds.parallel.groups import initialize_process_groups
    from raptr_ds.planner.measure import DeviceProbe

    groups = initialize_process_groups(Launch(rank, rank, count, "127.0.0.1", port, "none"), 1, 1)
    probe = DeviceProbe(config, groups)
    for number in range(_WARMUP + _REPETITIONS):
        if number == _WARMUP:
            probe.forget()
        probe.sample()
    if rank == 0:
        found.write_text(json.dumps(asdict(probe.device(device))), encoding="utf-8")
    dist.destroy_process_group()
