"""What can be found wrong with a run before it is submitted: the data, the memory, the disk, and the run's folder."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from raptr_ds.checkpoint.folder import CHECKPOINTS, checkpoints_at, checkpoints_in
from raptr_ds.config.batch import BATCH_KEYS
from raptr_ds.config.hjson_text import read_hjson
from raptr_ds.config.load import load_run_config
from raptr_ds.config.overrides import apply_overrides
from raptr_ds.config.run import RunConfig
from raptr_ds.data.loader import build_objective, folders_of, load_tokenizer
from raptr_ds.errors import ConfigError, DataError
from raptr_ds.paths.cost import num_parameters
from raptr_ds.planner.setting import layout_of
from raptr_ds.planner.shortage import MemoryNeed, gib, shortage
from raptr_ds.runtime.events import read_events
from raptr_ds.runtime.exports import EXPORTS
from raptr_ds.runtime.out_of_memory import DeviceMemory
from raptr_ds.submit.layout import JobLayout
from raptr_ds.supervise.slurm_commands import run_slurm
from raptr_ds.supervise.status import ALIVE_SECONDS, holder_of
from raptr_ds.user_paths import exists, is_folder

_GIB = 1 << 30
_WEIGHT_BYTES = {"fp32": 4, "bf16": 2}


def load_checked(file: Path, overrides: Sequence[str], layout: JobLayout) -> RunConfig:
    """Return the run at its largest size, with its vocabulary; it can start at every size that Slurm may give.

    Raises: ConfigError, DataError, CheckpointError, PathError.
    """
    config, *_ = [load_run_config(file, overrides, size) for size in layout.world_sizes]
    missing = [folder for folder in folders_of(config.data.path) if not is_folder(folder)]
    if missing:
        raise DataError(
            f"raptr_ds.data.path: there is no folder {', '.join(missing)}. Make it with tools/prepare_data.py, on a "
            "file system that the nodes share."
        )
    tokenizer = load_tokenizer(config.data)
    config = config.with_vocab_size(tokenizer.vocab_size)
    build_objective(config.objective, config.model, tokenizer, config.data.packing)
    if config.checkpoint.load not in ("auto", "none"):
        checkpoints_at(Path(config.checkpoint.load), of_run_file=True)
    return config


def check_memory(config: RunConfig, layout: JobLayout, device_gib: float | None) -> str:
    """Return what a process needs by the memory plan.

    device_gib: memory of a GPU; None if it is not known here. Raises: ConfigError if the plan does not fit.
    """
    if device_gib is not None and not (layout.has_gpus and 0 < device_gib < 1e6):
        raise ConfigError(
            f"--device-memory {device_gib:g} must be the GiB of one GPU, with --gpus-per-node: --device-memory 80."
        )
    if device_gib is not None:
        lines = shortage(config, DeviceMemory("a GPU of --device-memory", int(device_gib * _GIB)))
        if lines:
            raise ConfigError("\n".join([lines[0].removeprefix("**Warning.** "), *lines[1:]]))
    stages = range(config.parallel.pipeline_model_parallel_size)
    most = max(MemoryNeed.of(config, stage, on_gpu=layout.has_gpus).memory.total for stage in stages)
    if not layout.has_gpus:
        return f"memory: about {gib(most)} for each process, {layout.tasks_per_node} on a node"
    known = "" if device_gib is not None else "; not compared with the GPU's, which --device-memory GIB does"
    return f"memory: about {gib(most)} of each GPU{known}"


def checkpoint_bytes(config: RunConfig) -> int:
    """Return the size of a checkpoint: weights and optimizer state in fp32. The vocabulary's size must be known."""
    layout = layout_of(config, on_gpu=False)
    return num_parameters(config.model) * (_WEIGHT_BYTES["fp32"] + layout.optimizer_bytes)


def exports_bytes(config: RunConfig) -> int:
    """Return the size of all exports of a run, which are kept: their weights. The vocabulary's size must be known."""
    section = config.checkpoint
    if not section.export_interval:
        return 0
    count = -(-config.train.steps // section.export_interval)  # and the end of the run
    return count * num_parameters(config.model) * _WEIGHT_BYTES[section.export_precision]


def check_disk(configs: Sequence[RunConfig], folder: Path) -> str:
    """Return the room that the checkpoints and exports of runs below a folder take.

    One checkpoint more than are kept, while one is written. Raises: ConfigError if the disk has less room.
    """
    checkpoints = sum((config.checkpoint.keep + 1) * checkpoint_bytes(config) for config in configs)
    exports = sum(map(exports_bytes, configs))
    there = sum(
        path.stat().st_size
        for config in configs
        for name in (CHECKPOINTS, EXPORTS)
        for step in checkpoints_in(Path(config.train.save) / name)
        for path in step.iterdir()
    )
    place = _nearest(folder)
    free = shutil.disk_usage(place).free
    if checkpoints + exports > free + there:
        keep = configs[0].checkpoint.keep
        raise ConfigError(
            f"{place} has {gib(free)} free, and {keep + 1} checkpoints (raptr_ds.checkpoint.keep={keep}, and "
            f"the one that is being written) of {len(configs)} run{'s' * (len(configs) > 1)} take "
            f"{gib(checkpoints)}{f', and all exports {gib(exports)}' if exports else ''}. Make room, lower keep"
            f"{', raise export_interval' if exports else ''}, or set raptr_ds.train.save to another disk."
        )
    return (
        f"disk: {gib(checkpoints)} for checkpoints{f', {gib(exports)} for exports' if exports else ''}, {gib(free)} "
        f"free at {place}"
    )


def check_folder(folder: Path, now: float, may_wait: bool = False) -> None:
    """Check that no run works in a folder, and that no job waits to.

    now: seconds since 1970. may_wait: whether such a job may be there: one of the same name starts after it.
    Raises: ConfigError, PathError.
    """
    place = str(folder.absolute())
    if unfit := [character for character in place if character in "%\\" or not character.isprintable()]:
        raise ConfigError(
            f"the run's folder {place!r} holds {unfit[0]!r}, which Slurm replaces in the name of a job's output. Set "
            "raptr_ds.train.save to a folder without it."
        )
    nearest = _nearest(folder)
    if not is_folder(nearest) or not os.access(nearest, os.W_OK | os.X_OK):
        why = "you may not write to it" if is_folder(nearest) else "it is no folder"
        raise ConfigError(
            f"the run's folder {folder} cannot be made or written at {nearest}: {why}. Set raptr_ds.train.save to "
            "another folder."
        )
    holder, silent = holder_of(folder, now)
    if holder is not None and silent is not None and silent < ALIVE_SECONDS:
        raise ConfigError(
            f"another run works in {folder}: {holder}. Set raptr_ds.train.save to another folder, or wait for that run "
            "to end."
        )
    jobs = {str(event["job"]) for event in read_events(folder) if event.get("event") == "submit" and "job" in event}
    if may_wait or not jobs:
        return
    # If Slurm does not answer, sbatch, which follows, prints why.
    listed = run_slurm("squeue", "--me", "--noheader", "--array", "--format=%i").text
    if waiting := sorted(jobs.intersection(listed.split())):
        raise ConfigError(
            f"job {', '.join(waiting)} is in the queue for {folder} already. Cancel it (scancel {waiting[0]}), or set "
            "raptr_ds.train.save to another folder."
        )


def measured_lead(folder: Path) -> int | None:
    """Return the signal's lead that an earlier start of the run found necessary, in seconds."""
    leads = [event.get("write") for event in read_events(folder) if event.get("event") == "signal_lead"]
    return next((lead for lead in reversed(leads) if isinstance(lead, int)), None)


def _nearest(folder: Path) -> Path:
    """Return the folder, or what there is of the path to it."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if exists(place))


def complete_run_file(config: RunConfig, file: Path, overrides: Sequence[str]) -> str:
    """Return the run file with every value, but only the batch sizes that are given, so that it serves other sizes."""
    given, _ = apply_overrides(read_hjson(file)[0], overrides)
    left_out = {key for key in BATCH_KEYS if given.get(key) is None}
    tree = {key: value for key, value in config.resolved().items() if key not in left_out}
    return json.dumps(tree, indent=2) + "\n"
