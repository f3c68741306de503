"""Measure training steps of one model on one device: path lengths, variants, memory, and where the time goes.

python -m tests.gpu.kit.measure_training ul2_1b|bert_base [--profile FILE] [--seconds N]

The step is the engine's own on a random batch, with initial weights, so that only time and memory mean anything. What
training waits for around it, tools/bench.py measures, and it compares with other stacks.
"""

import argparse
import gc
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from raptr_ds.bench.samples import MedianRatio
from raptr_ds.config.run import RunConfig
from raptr_ds.errors import ConfigError
from raptr_ds.parallel.groups import ProcessGroups, initialize_process_groups
from raptr_ds.parallel.launch import detect_launch, prepare_imports
from raptr_ds.paths.cost import num_parameters, step_flops
from raptr_ds.planner.measure import synchronize
from raptr_ds.planner.random_batch import random_step_batch
from raptr_ds.rng import stream
from raptr_ds.runtime.utilization import model_flops_utilization
from tests.gpu.kit.findings import Findings
from tests.gpu.kit.measured_device import DEVICE, IS_DRY_RUN, peak
from tests.gpu.kit.measured_models import MODELS, Batch
from tests.gpu.kit.step_profile import profile_step

_FULL = (1.0,)
_PATHS = (1.0, 0.75, 0.5)  # of the layers
_WARMUP_ROUNDS = 2
_LEARNING_RATE = 1e-6
_LEFT_BYTES = 1 << 30  # what may stay allocated when a model is gone: workspaces and caches of libraries


@dataclass(frozen=True)
class Variant:
    """One row of the measurement: what differs from the run file, on which batch, at which shares of the layers.

    settings: as for `--set`; what the run file does not know is left out with its message. batch: None for the model's
    own. is_profiled: whether a step is profiled too.
    """

    name: str
    settings: tuple[str, ...] = ()
    batch: Batch | None = None
    shares: tuple[float, ...] = _FULL
    rounds: int = 4
    is_profiled: bool = False


_NO_DROPOUT = ("raptr_ds.model.hidden_dropout=0.0", "raptr_ds.model.attention_dropout=0.0")
_NOT_COMPILED = ("raptr_ds.train.compile=false",)
_BY_TORCH = ("raptr_ds.train.attention_backend=sdpa",)

# In order of worth: time may run out. Rows with the same settings stand together, as they share a model.
VARIANTS = {
    "ul2_1b": (
        Variant("as shipped", shares=_PATHS, is_profiled=True),
        Variant("larger micro batch", batch=Batch(16, 1), rounds=2),
        Variant("more micro batches", batch=Batch(8, 8), rounds=1),
        Variant("not compiled", _NOT_COMPILED, rounds=2, is_profiled=True),
        Variant("attention by torch, dense masks", _BY_TORCH, rounds=2),
        Variant("gradients accumulated in bf16", ("data_types.grad_accum_dtype=bf16",), rounds=2),
    ),
    "bert_base": (
        Variant("as shipped, dropout 0.1", shares=_PATHS, is_profiled=True),
        Variant("without dropout", _NO_DROPOUT, shares=_PATHS, is_profiled=True),
        Variant("not compiled", _NOT_COMPILED, rounds=2, is_profiled=True),
        Variant("attention by torch, dropout spelled out", _BY_TORCH, rounds=2),
        Variant("not compiled, without dropout", (*_NOT_COMPILED, *_NO_DROPOUT), rounds=2),
    ),
}


@dataclass
class StepTimes:
    """What was measured of a variant: seconds of each share of the layers, by round, and bytes on the device.

    first_seconds: of the very first step, which compiles where steps are compiled.
    """

    seconds: dict[float, list[float]]
    losses: list[float] = field(default_factory=list)
    first_seconds: float = 0.0
    peak_bytes: int = 0
    reserved_bytes: int = 0


class TrainedModel:
    """A model under training, built as training builds it; `close` gives its memory back."""

    def __init__(self, config: RunConfig, groups: ProcessGroups) -> None:
        from raptr_ds.engine.build import build_engine  # DeepSpeed: after prepare_imports

        self._engine: Any = build_engine(config, groups)
        self._number = 0

    def step(self, config: RunConfig, batch: Any, share: float) -> tuple[float, float]:
        """Train one step along a random path of this share of the layers; return seconds and loss."""
        from raptr_ds.bench.ours import measured_path

        length = round(share * config.model.num_layers)
        path = measured_path(config, length, stream(0, "measured path", self._number))
        synchronize(DEVICE)
        start = time.perf_counter()
        result = self._engine.train_step(batch, path, self._number, _LEARNING_RATE)
        synchronize(DEVICE)
        self._number += 1
        return time.perf_counter() - start, result.loss

    def measure(self, config: RunConfig, variant: Variant) -> StepTimes:
        """Train rounds of steps, one of each share in each, and time those after the first rounds."""
        gc.collect()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        batch = random_step_batch(config, 0)
        found = StepTimes({share: [] for share in variant.shares})
        for number in range(_WARMUP_ROUNDS + (1 if IS_DRY_RUN else variant.rounds)):
            for share in variant.shares:
                seconds, loss = self.step(config, batch, share)
                found.first_seconds = found.first_seconds or seconds
                found.losses.append(loss)
                if number >= _WARMUP_ROUNDS:
                    found.seconds[share].append(seconds)
        if DEVICE.type == "cuda":
            found.peak_bytes = torch.cuda.max_memory_allocated()
            found.reserved_bytes = torch.cuda.max_memory_reserved()
        return found

    def profile(self, config: RunConfig, title: str, findings: Findings) -> str:
        """Profile one full step and return its report."""
        batch = random_step_batch(config, 0)
        self.step(config, batch, 1.0)
        return profile_step(lambda: self.step(config, batch, 1.0)[0], title, findings)

    def close(self) -> None:
        """Let go of weights, optimizer and compiled graphs."""
        self._engine.engine.destroy()
        self._engine = None
        torch._dynamo.reset()
        gc.collect()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()


def report(findings: Findings, name: str, config: RunConfig, found: StepTimes) -> None:
    """Write a line for each share of the layers: speed, utilization, memory, and how much of the saving is reached."""
    shape, sequences = config.model, config.batch.global_batch
    predictions = random_step_batch(config, 0).num_predictions
    depth = config.model.num_layers
    flops = {share: step_flops(shape, round(share * depth), sequences, predictions) for share in found.seconds}
    is_finite = all(abs(loss) < float("inf") for loss in found.losses)
    for share, samples in found.seconds.items():
        seconds = median(samples)
        rate = flops[share] / seconds
        mfu = model_flops_utilization(rate, peak(), 1)
        text = f"{seconds * 1e3:.1f} ms (+{max(samples) / seconds - 1:.0%}), {rate / 1e12:.3g} TFLOP/s"
        text += "" if mfu is None else f", MFU {mfu:.1%}"
        text += f", {sequences * shape.seq_length / seconds / 1e3:.1f}k tokens/s"
        if share == 1.0:
            text += f", first step {found.first_seconds:.1f} s"
            text += f", peak {found.peak_bytes / 2**30:.1f} GiB, reserved {found.reserved_bytes / 2**30:.1f} GiB"
        else:
            by_flops = flops[1.0] / flops[share]
            reached = MedianRatio.of(found.seconds[1.0], samples, by_flops)
            text += f", {reached.value * by_flops:.3f} x as fast of {by_flops:.3f} by FLOPs: {reached.value:.1%}"
            text += f" ({reached.low:.1%} to {reached.high:.1%})"
        findings.check(
            is_finite,
            f"{name}, path {round(share * depth)} of {depth}, {config.batch.accumulation} x {config.batch.micro_batch}",
            text if is_finite else f"{text}; a loss is not finite",
            seconds=samples,
            flops=flops[share],
            mfu=mfu,
            peak_bytes=found.peak_bytes,
        )


class Measurement:
    """The variants of a model, one after another; those with the same settings share what is trained."""

    def __init__(self, name: str, groups: ProcessGroups, findings: Findings, profile: Path | None) -> None:
        self._name, self._model, self._groups = name, MODELS[name], groups
        self._findings, self._profile = findings, profile
        self._trained: TrainedModel | None = None
        self._settings: tuple[str, ...] = ()

    def run(self, variant: Variant) -> None:
        """Measure one variant and write its findings; one that does not fit in memory says so."""
        name = f"{self._name} {variant.name}"
        try:
            config = self._model.config(variant.settings, None if IS_DRY_RUN else variant.batch)
        except ConfigError as error:
            self._findings.figure(name, f"left out: {error}")
            return
        try:
            trained = self._model_for(variant.settings)
            report(self._findings, name, config, trained.measure(config, variant))
            if variant.is_profiled and self._profile is not None:
                text = trained.profile(config, name, self._findings)
                with self._profile.open("a", encoding="utf-8") as stream:
                    stream.write(text)
        except torch.OutOfMemoryError:
            self.close()
            if variant.batch is None:
                raise
            self._findings.figure(name, "out of memory")
        except BaseException:
            self.close()  # a step that failed half-way leaves a model that no other variant should be measured on
            raise

    def close(self) -> None:
        """Let go of the model, and check that its memory came back."""
        if self._trained is None:
            return
        self._trained.close()
        self._trained = None
        left = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0
        if left > _LEFT_BYTES:
            self._findings.check(False, f"{self._name} memory", f"{left / 2**30:.1f} GiB stay when a model is gone")

    def _model_for(self, settings: tuple[str, ...]) -> TrainedModel:
        if self._trained is None or settings != self._settings:
            self.close()
            start = time.perf_counter()
            config = self._model.config(settings)
            self._trained, self._settings = TrainedModel(config, self._groups), settings
            seconds = time.perf_counter() - start
            size = num_parameters(config.model) / 1e9
            self._findings.figure(f"{self._name} built", f"{size:.3f}G parameters in {seconds:.0f} s")
        return self._trained


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=VARIANTS)
    parser.add_argument("--profile", type=Path, help="append profiles there")
    parser.add_argument("--seconds", type=float, default=150.0, help="begin no variant later than this (default 150)")
    return parser.parse_args()


def main() -> None:
    """Measure the variants of a model, as many as fit into the time."""
    begun = time.perf_counter()
    options = parse()
    findings = Findings.of_environment()
    # Models and batches of several sizes follow each other: what one freed, in its own block sizes, serves the next.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    prepare_imports(DEVICE.type == "cuda")
    groups = initialize_process_groups(detect_launch(), 1, 1)
    measurement = Measurement(options.model, groups, findings, options.profile)
    for variant in VARIANTS[options.model]:
        name = f"{options.model} {variant.name}"
        if time.perf_counter() - begun > options.seconds:
            findings.figure(name, f"left out: more than {options.seconds:.0f} s had passed")
            continue
        with findings.part(name):
            measurement.run(variant)
    findings.leave()


if __name__ == "__main__":
    main()
