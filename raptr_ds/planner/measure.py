"""The cost model's Device, measured: the speeds of this machine's devices and links on a run's own shapes.

A few layers and the head of the run's model train without DeepSpeed, the optimizer steps on their parameters, and the
ranks exchange a message of the size that the layout sends most. All ranks do so at the same time, as in training.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch
import torch.distributed as dist

from raptr_ds.config.run import RunConfig
from raptr_ds.data.batch import MicroBatch
from raptr_ds.model.stage import Stage, build_stage
from raptr_ds.parallel.dropout import DropoutStreams, dropout_keys
from raptr_ds.parallel.groups import ProcessGroups, make_process_groups
from raptr_ds.parallel.topology import Topology
from raptr_ds.paths import LayerPath
from raptr_ds.paths.cost import layer_parameters, step_flops
from raptr_ds.planner.random_batch import random_micro_batch
from raptr_ds.planner.setting import layout_of
from raptr_ds.planner.step_time import OPTIMIZER_BYTES, Device, tensor_collective_seconds

_MOST_LAYERS = 4  # of the model that are built: enough to leave the caches
_SMALL_MESSAGE = 1  # elements
_SHORTEST = 1e-9  # seconds: a message that took no longer than a small one
_LEAST_COMPUTING = 0.1  # of a step's time, whatever its reductions were measured to take
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class DeviceProbe:
    """Pieces of a training step, timed any number of times; between real steps they run under the same conditions.

    All ranks of one machine make one and call its methods together. config: with the vocabulary's size.
    times: samples of each piece's seconds on the slowest rank, by the piece's name.
    """

    def __init__(self, config: RunConfig, groups: ProcessGroups) -> None:
        self._groups, self._config = groups, config
        self._layout, self._shape = layout_of(config, groups.device.type == "cuda"), config.model
        size = groups.topology.world_size
        # Split over tensor ranks as the run's layers are; where they span machines, whole.
        self._tensor = self._layout.tensor if size % self._layout.tensor == 0 else 1
        split = make_process_groups(Topology(self._tensor, 1, size // self._tensor), groups.rank, groups.device)
        self._num_layers = min(config.model.num_layers, _MOST_LAYERS)
        stage = build_stage(config.model, split, range(self._num_layers), recompute=False, seed=0).to(groups.device)
        stage = stage.to(_DTYPES[config.precision])
        batch = random_micro_batch(config, range(config.batch.micro_batch)).to(groups.device)
        self._num_predictions = batch.num_predictions
        path = LayerPath(tuple(range(self._num_layers)), config.model.num_layers)
        self._num_parameters = self._num_layers * layer_parameters(self._shape) // self._tensor
        self._message = layer_parameters(self._shape)  # elements of what the layout sends most
        if self._layout.tensor > 1 or self._layout.num_stages > 1:
            self._message = self._layout.micro_batch * config.model.seq_length * config.model.hidden_size
        self._pieces: dict[str, Callable[[], object]] = {
            "training": lambda: _train(stage, batch, path),
            "optimizer": _optimizer_step(self._num_parameters, groups.device),
        }
        if size > 1:
            self._pieces["small message"] = _all_reduce(groups, _SMALL_MESSAGE, config)
            self._pieces["large message"] = _all_reduce(groups, self._message, config)
        self.times: dict[str, list[float]] = {}
        self.forget()

    def sample(self) -> None:
        """Time each piece once more."""
        for name, piece in self._pieces.items():
            self.times[name].append(slowest_seconds(self._groups, piece))

    def forget(self) -> None:
        """Drop all samples."""
        self.times = {name: [] for name in self._pieces}

    def device(self, device: Device) -> Device:
        """Return `device` with what this machine reaches, by medians, in place of its speeds; the same on all ranks.

        Speeds between machines stay.
        """
        seconds = {name: median(samples) for name, samples in self.times.items()}
        size = self._groups.topology.world_size
        device = replace(device, ranks_per_machine=size, is_gpu=self._groups.device.type == "cuda")
        if size > 1:
            sent = 2 * (size - 1) / size * self._message * self._layout.bytes_per_value
            transfer = max(seconds["large message"] - seconds["small message"], _SHORTEST)
            device = replace(device, machine_bytes_per_second=sent / transfer, latency_seconds=seconds["small message"])
        computing = seconds["training"]
        if self._tensor > 1:
            # Without the collectives of both passes, which the cost model counts separately.
            sending = self._num_layers * sum(tensor_collective_seconds(self._shape, self._layout, device))
            computing = max(computing - sending, _LEAST_COMPUTING * computing)
        sequences = self._config.batch.micro_batch
        flops = step_flops(self._shape, self._num_layers, sequences, self._num_predictions) / self._tensor
        return replace(
            device,
            flops_per_second=flops / computing,
            memory_bytes_per_second=OPTIMIZER_BYTES * self._num_parameters / seconds["optimizer"],
        )


def _train(stage: Stage, batch: MicroBatch, path: LayerPath) -> None:
    stage.zero_grad(set_to_none=True)
    keys = dropout_keys(0, 0, stage.model.num_layers, batch.tokens.device)
    stage(batch.tokens, batch, path, DropoutStreams(keys, batch.sample_ids)).mean().backward()


def _optimizer_step(num_parameters: int, device: torch.device) -> Callable[[], object]:
    parameter = torch.zeros(num_parameters, device=device, requires_grad=True)
    parameter.grad = torch.ones_like(parameter)
    return torch.optim.AdamW([parameter], fused=True).step


def _all_reduce(groups: ProcessGroups, elements: int, config: RunConfig) -> Callable[[], object]:
    message = torch.zeros(elements, dtype=_DTYPES[config.precision], device=groups.device)
    return lambda: dist.all_reduce(message, group=groups.world)


def slowest_seconds(
    groups: ProcessGroups, work: Callable[[], object], clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the seconds of some work, which all ranks do, on the slowest rank."""
    synchronize(groups.device)
    dist.barrier(group=groups.control)
    start = clock()
    work()
    synchronize(groups.device)
    seconds = torch.tensor(clock() - start, dtype=torch.float64)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=groups.control)
    return seconds.item()


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work; a CPU already has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
