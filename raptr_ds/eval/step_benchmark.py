"""Step times: a model at several path lengths beside its Hugging Face twin, interleaved in one process."""

import ctypes
import ctypes.util
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path as FilePath
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from raptr_ds.config.load import RunConfig
from raptr_ds.data.batch import MicroBatch, StepBatch
from raptr_ds.engine.build import build_engine
from raptr_ds.engine.fragments import WEIGHT
from raptr_ds.engine.parameter_groups import is_decayed
from raptr_ds.engine.protocol import Engine
from raptr_ds.errors import ConfigError
from raptr_ds.eval.huggingface import hugging_face_inputs, to_hugging_face
from raptr_ds.parallel.agreement import PathAgreement
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.paths import Path
from raptr_ds.paths.cost import ModelShape, step_flops
from raptr_ds.paths.raptr import draw_uniform
from raptr_ds.rng import stream

WARMUP_ROUNDS = 2
_CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_STEPS_AHEAD = 1 << 40  # agreement never reaches the run's end


@dataclass
class Measured:
    """One contestant's samples, one for each round; memory_bytes is a step's peak above what was held before it."""

    name: str
    path_length: int
    flops: int
    seconds: list[float] = field(default_factory=list)
    agreement_seconds: list[float] = field(default_factory=list)
    memory_bytes: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class StepBenchmark:
    """What was measured.

    paths: ours, the full path first. twin: Hugging Face, None where it has no such model (no_twin says why).
    losses: (ours, twin's) full-model loss of the batch before any step, to show that they compute the same.
    """

    config: RunConfig
    num_parameters: int
    num_predictions: int
    paths: list[Measured]
    twin: Measured | None
    no_twin: str
    losses: tuple[float, float]
    peak_bytes: int
    clock: str


class OurStep:
    """A training step as the training loop makes it: agree on the path, then the engine's step."""

    def __init__(self, engine: Engine, groups: ProcessGroups, config: RunConfig, lengths: Sequence[int]) -> None:
        self._engine, self._config, self._lengths = engine, config, lengths
        self._agreement = PathAgreement(groups, self._words_at, lambda: False, _STEPS_AHEAD)
        self._step = 0

    def _words_at(self, step: int) -> np.ndarray:
        """Return the path of a step: the lengths in turn, first and last layer fixed where they have room."""
        depth, length = self._config.model.num_layers, self._lengths[step % len(self._lengths)]
        fixed = (0, depth - 1) if length >= 2 and depth > 1 else ()
        return Path(draw_uniform(stream(0, "bench", step), depth, length, fixed), depth).encode()

    def run(self, batch: StepBatch, path_length: int) -> float:
        """Train the next step, which is of this length, and return the seconds that agreement kept it waiting."""
        start = time.perf_counter()
        path = Path.decode(self._agreement.at(self._step).words)
        waited = time.perf_counter() - start
        assert path.length == path_length, (path, path_length)
        self._engine.train_step(batch, path, self._step, self._config.optimizer["params"]["lr"])
        self._step += 1
        return waited


class TwinStep:
    """A training step of the transformers model, as its users write one; bf16 is autocast, as in its Trainer."""

    def __init__(self, config: RunConfig, weights: dict[str, torch.Tensor], device: torch.device) -> None:
        self._config, self._device = config, device
        self.model: nn.Module = to_hugging_face(config.model, weights).to(device).train()  # type: ignore[arg-type]
        self._optimizer = _adamw(self.model, config.optimizer)
        self._dtype = {"bf16": torch.bfloat16}.get(config.precision, torch.float32)

    def loss(self, micro: MicroBatch) -> torch.Tensor:
        """Return the mean loss of a micro batch."""
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            return self.model(**hugging_face_inputs(self._config.model, micro)).loss

    def run(self, batch: StepBatch) -> float:
        """Train one step and return its loss."""
        batch, total = batch.to(self._device), torch.zeros((), device=self._device)
        for micro in batch.micro_batches:
            loss = self.loss(micro) * (micro.num_predictions / batch.num_predictions)
            loss.backward()
            total += loss.detach()
        if self._config.gradient_clipping > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._config.gradient_clipping)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return total.item()


def _adamw(model: nn.Module, optimizer: dict[str, Any]) -> torch.optim.AdamW:
    """Return torch's AdamW with the run file's values, biases and norms without decay, as our engines have it.

    Raises: ConfigError if the run has another optimizer.
    """
    if optimizer["type"] not in {"Adam", "AdamW"}:
        raise ConfigError(
            f"the comparison with Hugging Face is written for AdamW, but optimizer.type={optimizer['type']}. "
            "Add --set optimizer.type=AdamW."
        )
    params = optimizer["params"]
    chosen = {key: params[key] for key in ("lr", "betas", "eps") if key in params}
    chosen["betas"] = tuple(chosen.get("betas", (0.9, 0.999)))
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if is_decayed(p)], "weight_decay": params.get("weight_decay", 0.01)},
        {"params": [p for p in parameters if not is_decayed(p)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, **chosen)


def measure_steps(
    config: RunConfig, groups: ProcessGroups, batch: StepBatch, repetitions: int, clock: str = "wall"
) -> StepBenchmark:
    """Measure the full path, 3/4 and 1/2 of it, and the Hugging Face twin: one step of each in every round.

    Each round makes one step of everybody, so that what else the machine does meets all alike; the first rounds are
    not counted. config: one process, with the vocabulary's size. clock: `wall`, or `cpu`, the process's own time on
    the processors, which a busy machine disturbs less (for one thread on a CPU the two are the same on an idle one).
    """
    engine: Any = build_engine(config, groups)
    full = Path.full(config.model.num_layers)
    lengths = _path_lengths(config.model.num_layers)
    weights = {f.name: f.data.view(f.local_shape).cpu().clone() for f in engine.fragments() if f.kind == WEIGHT}
    twin, no_twin, twin_loss = None, "", float("nan")
    try:
        twin = TwinStep(config, weights, groups.device)
    except ConfigError as error:
        no_twin = str(error)
    num_parameters = sum(weight.numel() for weight in weights.values())
    del weights
    if twin is not None:
        twin_loss = _evaluate_twin(twin, batch.to(groups.device))
    losses = engine.evaluate([batch], full), twin_loss

    ours = OurStep(engine, groups, config, lengths)
    paths = [Measured("raptr_ds", length, _flops(config, batch, length)) for length in lengths]
    theirs = None if twin is None else Measured("Hugging Face", full.length, _flops(config, batch, full.length))
    for number in range(WARMUP_ROUNDS + repetitions):
        counted = number >= WARMUP_ROUNDS
        for measured in paths:
            length = measured.path_length
            _sample(measured, groups.device, counted, clock, lambda length=length: ours.run(batch, length))
        if twin is not None and theirs is not None:
            _sample(theirs, groups.device, counted, clock, lambda: twin.run(batch) and 0.0)
    return StepBenchmark(
        config=config,
        num_parameters=num_parameters,
        num_predictions=batch.num_predictions,
        paths=paths,
        twin=theirs,
        no_twin=no_twin,
        losses=losses,
        peak_bytes=_process_peak(groups.device),
        clock=clock,
    )


def _path_lengths(num_layers: int) -> list[int]:
    """Return L, 3L/4 and L/2, those that differ."""
    return sorted({num_layers, max(1, 3 * num_layers // 4), max(1, num_layers // 2)}, reverse=True)


def _flops(config: RunConfig, batch: StepBatch, path_length: int) -> int:
    shape = ModelShape(**{f.name: getattr(config.model, f.name) for f in fields(ModelShape)})
    recomputing = config.parallel.activation_checkpointing
    return step_flops(shape, path_length, config.batch.global_batch, batch.num_predictions, recomputing)


@torch.no_grad()
def _evaluate_twin(twin: TwinStep, batch: StepBatch) -> float:
    twin.model.eval()
    losses = [twin.loss(micro).item() * micro.num_predictions for micro in batch.micro_batches]
    twin.model.train()
    return sum(losses) / batch.num_predictions


def _sample(measured: Measured, device: torch.device, counted: bool, clock: str, step: Callable[[], float]) -> None:
    """Run one step and keep its time, its wait for agreement and its memory."""
    now = _CLOCKS[clock]
    gc.collect()
    memory = _StepMemory(device)
    _synchronize(device)
    start = now()
    waited = step()
    _synchronize(device)
    seconds = now() - start
    if counted:
        measured.seconds.append(seconds)
        measured.agreement_seconds.append(waited)
        measured.memory_bytes.append(memory.peak_above_start())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median of the ratios within each round: what slows a whole round down cancels."""
    return median(a / b for a, b in zip(numerators, denominators, strict=True))
