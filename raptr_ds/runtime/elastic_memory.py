"""A run that comes back on another number of GPUs: the ZeRO stage and micro batch follow the memory that each has."""

import json
from collections.abc import Callable
from pathlib import Path

from raptr_ds.config.batch import MICRO
from raptr_ds.config.run import RunConfig
from raptr_ds.parallel.agreement import on_first_rank
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.parallel.launch import Launch
from raptr_ds.runtime.events import read_events
from raptr_ds.runtime.out_of_memory import DeviceMemory
from raptr_ds.runtime.planner_process import PlannerError, ask_planner

_GIB = 1 << 30


def fitted_to_memory(
    config: RunConfig, groups: ProcessGroups, launch: Launch, report: Callable[[str], None]
) -> RunConfig:
    """Return a run that was started again with sizes that fit into a GPU by the memory plan; collective.

    A run on as many processes as its user started it on, on CPUs, or whose sizes fit stays as it is. What changes is
    printed, and so is a plan under which nothing fits: the run then starts with what needs least. The trajectory stays,
    to rounding.
    """
    if not launch.restart_count:
        return config
    sizes = on_first_rank(groups, lambda: _sizes(config, groups, launch, report))
    return config if sizes is None else config.with_memory_sizes(*sizes)


def _sizes(
    config: RunConfig, groups: ProcessGroups, launch: Launch, report: Callable[[str], None]
) -> tuple[int, int] | None:
    device = DeviceMemory.of(groups.device)
    if device is None or _started_on(Path(config.train.save)) in (None, launch.world_size):
        return None
    arguments = ["--processes", str(launch.world_size), "--memory", str(device.total)]
    try:
        fit = json.loads(ask_planner("raptr_ds.planner.fit", arguments, config))
    except PlannerError as error:
        report(f"warning: {error}, so ZeRO's stage and the micro batch stay as they were on more or fewer GPUs")
        return None
    stage, micro_batch = int(fit["zero_stage"]), int(fit["micro_batch"])
    need = f"{fit['needed'] / _GIB:.1f} GiB of {device.total / _GIB:.1f} GiB ({device.name}) by the plan"
    if not fit["is_enough"]:
        report(f"warning: on this number of GPUs no ZeRO stage and micro batch fit; the smallest needs {need}")
    if (stage, micro_batch) == (config.zero_stage, config.batch.micro_batch):
        return None
    report(f"zero_optimization.stage={stage}, {MICRO}={micro_batch} (started again on other GPUs: {need})")
    return stage, micro_batch


def _started_on(folder: Path) -> int | None:
    """Return the processes of the last start that was its user's, None where events.jsonl has none."""
    sizes = [
        event.get("world_size")
        for event in read_events(folder)
        if event["event"] == "start" and not event["restart_count"]
    ]
    return sizes[-1] if sizes else None
