"""Step times: a model at several path lengths beside the same model in other stacks, all taking turns."""

import ctypes
import ctypes.util
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path as FilePath
from typing import Any

import torch
import torch.distributed as dist

from raptr_ds.config.load import RunConfig
from raptr_ds.data.batch import StepBatch
from raptr_ds.data.loader import Loader
from raptr_ds.engine.build import build_engine
from raptr_ds.engine.fragments import WEIGHT
from raptr_ds.errors import ConfigError
from raptr_ds.eval.contestants import Contestant, HuggingFaceStep, MegatronStep, OurStep, measured_path
from raptr_ds.eval.device_measurement import DeviceProbe, synchronize
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.paths import Path
from raptr_ds.paths.cost import num_parameters, step_flops
from raptr_ds.paths.step_time import Device
from raptr_ds.rng import stream
from raptr_ds.runtime.method import setting_of, shape_of

WARMUP_ROUNDS = 2
MEMORY_ROUNDS = 3
_Step = Callable[[], tuple[float, float]]  # returns the seconds that agreement and loader kept it waiting
_CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Measured:
    """One contestant's samples, one for each round; of memory, one for each round that was not timed.

    seconds: of the slowest rank. agreement_seconds, loader_seconds: what the step waited, on the wall's clock.
    memory_bytes: a step's peak above what was held before it, on the first rank. loss: of the batch before any step,
    through the full model; None where it was not evaluated. path_length: in whole layers, where these run in parts.
    predicted_seconds: the cost model's, with what devices and links reach in the same rounds; None for other stacks.
    """

    name: str
    layout: str
    path_length: float
    flops: int
    seconds: list[float] = field(default_factory=list)
    agreement_seconds: list[float] = field(default_factory=list)
    loader_seconds: list[float] = field(default_factory=list)
    memory_bytes: list[int] = field(default_factory=list)
    loss: float | None = None
    predicted_seconds: float | None = None


@dataclass(frozen=True)
class StepBenchmark:
    """What was measured. paths: ours, the full path first. others: the same model elsewhere; absent: why some are not.

    has_loader: whether the batches came from prepared data, so that waiting for them was measured.
    """

    num_parameters: int
    num_predictions: int
    paths: list[Measured]
    others: list[Measured]
    absent: dict[str, str]
    peak_bytes: int
    clock: str
    has_loader: bool


def measure_steps(
    config: RunConfig,
    groups: ProcessGroups,
    batch: StepBatch,
    repetitions: int,
    clock: str = "wall",
    loader: Loader | None = None,
) -> StepBenchmark:
    """Measure the full path, 3/4 and 1/2 of it, and in one process the others: one step of each in every round.

    In random order, so that what else the machine does, and what a row leaves behind in caches, meets all alike. The
    first rounds are not counted. Memory has rounds of its own at the end: measured from a known start, a step takes
    every page from the system anew, which a training step does not, and which costs up to a tenth of it on a CPU. All
    ranks call it alike. config: with the vocabulary's size. clock:
    `wall`, or `cpu`, the process's own time on the processors, which a busy machine disturbs less; it leaves out what a
    rank waits for others. loader: asked for each step's batch, as in training.
    """
    engine: Any = build_engine(config, groups)
    layout, depth = layout_name(groups), config.model.num_layers
    paths = [Measured("raptr_ds", layout, length, _flops(config, batch, length)) for length in _path_lengths(config)]
    others, absent = _others(config, groups, engine)
    rows = [Measured(other.name, layout, depth, _flops(config, batch, depth)) for other in others]
    paths[0].loss = engine.evaluate([batch], Path.full(depth))
    for row, other in zip(rows, others, strict=True):
        row.loss = _evaluate(other, batch.to(groups.device))

    ours = OurStep(engine, groups, config, [measured.path_length for measured in paths], loader)
    theirs = [(row, partial(_run_other, other, batch)) for row, other in zip(rows, others, strict=True)]
    probe = DeviceProbe(config, groups)
    for number in range(WARMUP_ROUNDS + repetitions):
        if number == WARMUP_ROUNDS:
            probe.forget()
        probe.sample()
        for measured, step in _turns(number, batch, paths, ours, theirs):
            _time(measured, groups, number >= WARMUP_ROUNDS, clock, step)
    for number in range(MEMORY_ROUNDS):
        for measured, step in _turns(number, batch, paths, ours, theirs):
            _measure_memory(measured, groups.device, step)
    ours.close()
    setting = setting_of(config, probe.device(Device()))
    for measured in paths:
        path = measured_path(config, measured.path_length, stream(0, "bench prediction"))
        measured.predicted_seconds = float(setting.seconds([path]).total[0])
    return StepBenchmark(
        num_parameters=num_parameters(shape_of(config)),
        num_predictions=batch.num_predictions,
        paths=paths,
        others=rows,
        absent=absent,
        peak_bytes=_process_peak(groups.device),
        clock=clock,
        has_loader=loader is not None,
    )


def _turns(
    number: int, batch: StepBatch, paths: list[Measured], ours: OurStep, theirs: list[tuple[Measured, _Step]]
) -> Iterator[tuple[Measured, _Step]]:
    """Yield the steps of a round, each with its row, in random order; which of our paths is next, `ours` knows."""
    for turn in stream(0, "bench turns", number).permutation(len(theirs) + len(paths)):
        if turn < len(theirs):
            yield theirs[turn]
        else:
            measured = next(row for row in paths if row.path_length == ours.next_work)
            yield measured, partial(ours.run, batch)


def layout_name(groups: ProcessGroups) -> str:
    """Return a layout in short: TP2, PP2, TP2 PP2, one process."""
    topology = groups.topology
    parts = {"TP": topology.tensor, "PP": topology.pipeline, "DP": topology.data}
    return " ".join(f"{name}{size}" for name, size in parts.items() if size > 1) or "one process"


def _others(config: RunConfig, groups: ProcessGroups, engine: Any) -> tuple[list[Contestant], dict[str, str]]:
    """Return who else can take part, on the engine's weights, and why the others cannot."""
    if groups.topology.world_size > 1:
        return [], {}
    weights = {f.name: f.data.view(f.local_shape).cpu().clone() for f in engine.fragments() if f.kind == WEIGHT}
    makers: dict[str, Callable[[], Contestant]] = {
        HuggingFaceStep.name: lambda: HuggingFaceStep(config, weights),
        MegatronStep.name: lambda: MegatronStep(config, weights, groups),
    }
    others, absent = [], {}
    for name, make in makers.items():
        try:
            others.append(make())
        except ConfigError as error:
            absent[name] = str(error)
    return others, absent


def _path_lengths(config: RunConfig) -> list[float]:
    """Return L, 3L/4 and L/2, those that differ; where layers run in parts, the work of these shares of the heads."""
    depth = config.model.num_layers
    parts = config.model.num_attention_heads if config.path.method == "width" else depth
    counts = sorted({parts, max(1, 3 * parts // 4), max(1, parts // 2)}, reverse=True)
    return [count * depth / parts for count in counts]


def _flops(config: RunConfig, batch: StepBatch, path_length: float) -> int:
    predictions = batch.num_predictions * config.batch.data_parallel
    parallel = config.parallel
    share = path_length / parallel.pipeline_model_parallel_size  # the benchmark's paths are balanced
    recomputing = parallel.activation_checkpointing and share > parallel.keep_activations_up_to
    return step_flops(shape_of(config), path_length, config.batch.global_batch, predictions, recomputing)


@torch.no_grad()
def _evaluate(other: Contestant, batch: StepBatch) -> float:
    other.model.eval()
    losses = [other.loss(micro).item() * micro.num_predictions for micro in batch.micro_batches]
    other.model.train()
    return sum(losses) / batch.num_predictions


def _run_other(other: Contestant, batch: StepBatch) -> tuple[float, float]:
    other.run(batch)
    return 0.0, 0.0


def _time(measured: Measured, groups: ProcessGroups, counted: bool, clock: str, step: _Step) -> None:
    """Run one step and keep its time and its waits for agreement and loader."""
    now, device = _CLOCKS[clock], groups.device
    gc.collect()
    synchronize(device)
    if groups.topology.world_size > 1:
        dist.barrier(group=groups.control)
    start = now()
    agreement, loader = step()
    synchronize(device)
    seconds = torch.tensor(now() - start, dtype=torch.float64)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=groups.control)
    if counted:
        measured.seconds.append(seconds.item())
        measured.agreement_seconds.append(agreement)
        measured.loader_seconds.append(loader)


def _measure_memory(measured: Measured, device: torch.device, step: _Step) -> None:
    """Run one step and keep its peak of memory."""
    gc.collect()
    synchronize(device)
    memory = _StepMemory(device)
    step()
    synchronize(device)
    measured.memory_bytes.append(memory.peak_above_start())


class _StepMemory:
    """The peak of memory above where it stood at the start: the allocator's on a GPU, the resident set's on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._start = torch.cuda.memory_allocated(device)
            return
        library = ctypes.CDLL(ctypes.util.find_library("c"))
        if hasattr(library, "malloc_trim"):
            library.malloc_trim(0)  # or what an earlier step freed would hide what this one takes
        FilePath("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from here (proc(5))
        self._start = _status_bytes("VmRSS")

    def peak_above_start(self) -> int:
        """Return the peak so far, in bytes above the start."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._start
        return _status_bytes("VmHWM") - self._start


def _status_bytes(key: str) -> int:
    lines = FilePath("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def _process_peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status_bytes("VmHWM")
