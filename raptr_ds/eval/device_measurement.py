"""What this machine's devices and links reach on a run's own shapes: the cost model's Device, measured.

A few layers and the head of the run's model train without DeepSpeed, the optimizer steps on their parameters, and the
ranks exchange a message of the size that the layout sends most. All ranks do so at the same time, as in training.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch
import torch.distributed as dist

from raptr_ds.config.load import RunConfig
from raptr_ds.data.batch import MicroBatch
from raptr_ds.eval.random_batch import random_micro_batch
from raptr_ds.model.stage import Stage, build_stage
from raptr_ds.parallel.dropout import DropoutStreams
from raptr_ds.parallel.groups import ProcessGroups, make_process_groups
from raptr_ds.parallel.topology import Topology
from raptr_ds.paths import Path
from raptr_ds.paths.cost import layer_parameters, step_flops
from raptr_ds.paths.step_time import OPTIMIZER_BYTES, Device, tensor_reduction_seconds
from raptr_ds.runtime.method import layout_of, shape_of

_MOST_LAYERS = 4  # of the model that are built: enough to leave the caches
_WARMUP, _REPETITIONS = 2, 7
_SMALL_MESSAGE = 1  # elements
_SHORTEST = 1e-9  # seconds: a message that took no longer than a small one
_LEAST_COMPUTING = 0.1  # of a step's time, whatever its reductions were measured to take
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def measure_device(config: RunConfig, groups: ProcessGroups, device: Device) -> Device:
    """Return `device` with what this machine reaches in place of its speeds; those between machines stay.

    All ranks call it alike, those of one machine; each gets the slowest's values. config: with the vocabulary's size.
    """
    layout, shape = layout_of(config), shape_of(config)
    size = groups.topology.world_size
    device = replace(device, ranks_per_machine=size)
    if size > 1:
        device = replace(device, **_measure_links(config, groups))
    # Split over tensor ranks as the run's layers are; where they span machines, whole.
    tensor = layout.tensor if size % layout.tensor == 0 else 1
    groups = make_process_groups(Topology(tensor, 1, size // tensor), groups.rank, groups.device)
    num_layers = min(config.model.num_layers, _MOST_LAYERS)
    stage = build_stage(config.model, groups, range(num_layers), recompute=False, seed=0).to(groups.device)
    stage = stage.to(_DTYPES[config.precision])
    batch = random_micro_batch(config, range(config.batch.micro_batch)).to(groups.device)
    path = Path(tuple(range(num_layers)), config.model.num_layers)
    seconds = _slowest(groups, lambda: _train(stage, batch, path))
    if tensor > 1:
        # What is computing in it: the cost model counts the reductions, of both passes, apart.
        reductions = 2 * num_layers * tensor_reduction_seconds(shape, layout, device)
        seconds = max(seconds - reductions, _LEAST_COMPUTING * seconds)
    num_parameters = num_layers * layer_parameters(shape) // tensor
    optimizer = _slowest(groups, _optimizer_step(num_parameters, groups.device))
    flops = step_flops(shape, num_layers, config.batch.micro_batch, batch.num_predictions) / tensor
    return replace(
        device,
        flops_per_second=flops / seconds,
        memory_bytes_per_second=OPTIMIZER_BYTES * num_parameters / optimizer,
    )


def _measure_links(config: RunConfig, groups: ProcessGroups) -> dict[str, float]:
    """Return the speed and the latency between the ranks, by all-reduces of what the layout sends most."""
    layout = layout_of(config)
    elements = layer_parameters(shape_of(config))
    if layout.tensor > 1 or layout.num_stages > 1:
        elements = layout.micro_batch * config.model.seq_length * config.model.hidden_size
    latency = _slowest(groups, _all_reduce(groups, _SMALL_MESSAGE, config))
    transfer = max(_slowest(groups, _all_reduce(groups, elements, config)) - latency, _SHORTEST)
    size = groups.topology.world_size
    sent = 2 * (size - 1) / size * elements * layout.bytes_per_value
    return {"machine_bytes_per_second": sent / transfer, "latency_seconds": latency}


def _train(stage: Stage, batch: MicroBatch, path: Path) -> None:
    stage.zero_grad(set_to_none=True)
    stage(batch.tokens, batch, path, DropoutStreams(0, 0, batch.sample_ids)).mean().backward()


def _optimizer_step(num_parameters: int, device: torch.device) -> Callable[[], object]:
    parameter = torch.zeros(num_parameters, device=device, requires_grad=True)
    parameter.grad = torch.ones_like(parameter)
    return torch.optim.AdamW([parameter], fused=True).step


def _all_reduce(groups: ProcessGroups, elements: int, config: RunConfig) -> Callable[[], object]:
    message = torch.zeros(elements, dtype=_DTYPES[config.precision], device=groups.device)
    return lambda: dist.all_reduce(message, group=groups.world)


def _slowest(groups: ProcessGroups, work: Callable[[], object]) -> float:
    """Return the seconds of some work on the slowest rank, the median of several times."""
    times = []
    for _ in range(_WARMUP + _REPETITIONS):
        synchronize(groups.device)
        dist.barrier(group=groups.control)
        start = time.perf_counter()
        work()
        synchronize(groups.device)
        times.append(time.perf_counter() - start)
    seconds = torch.tensor(times[_WARMUP:], dtype=torch.float64)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=groups.control)
    return median(seconds.tolist())


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU was given to do; a CPU has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
