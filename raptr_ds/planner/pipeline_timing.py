"""Real pipeline steps, timed beside the simulator's: DeepSpeed's engine and processes, layers that sleep or compute."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from raptr_ds.config.run import RunConfig
from raptr_ds.engine.build import build_engine
from raptr_ds.engine.pipeline import PipelineEngine
from raptr_ds.model.stage import Stage
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.paths import LayerPath
from raptr_ds.planner.measure import slowest_seconds
from raptr_ds.planner.random_batch import random_step_batch
from raptr_ds.planner.simulator import pipeline_seconds
from raptr_ds.planner.step_time import active_in_stages, activity_table


@dataclass(frozen=True)
class TimedStep:
    """One step: the slowest rank's wall time, and the simulator's time for the pipeline alone."""

    measured_seconds: float
    simulated_seconds: float


class _Sleep(torch.autograd.Function):
    """The identity, which sleeps in both directions."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seconds: float, backward_seconds: float) -> torch.Tensor:  # pyright: ignore
        ctx.backward_seconds = backward_seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # pyright: ignore
        time.sleep(ctx.backward_seconds)
        return gradient, None, None


def sleep_in_layers(stage: Stage, forward_seconds: float, backward_seconds: float) -> None:
    """Make the stage's layers sleep instead of compute, so that timing does not need a core for each process.

    All active layers of the stage sleep in one go, as on a busy machine each wake-up may come late.
    """
    layers = [int(name) for name in stage.layers]

    def sleep(x: torch.Tensor, path: LayerPath, *_: Any) -> torch.Tensor:
        count = len(path.active_in(layers))
        return _Sleep.apply(x, count * forward_seconds, count * backward_seconds) if count else x

    stage.layers.forward = sleep  # type: ignore[method-assign]


def time_steps(
    config: RunConfig,
    groups: ProcessGroups,
    paths: Sequence[LayerPath],
    forward_seconds: float,
    backward_seconds: float,
    *,
    sleeps: bool,
    repetitions: int = 1,
    warmup_steps: int = 2,
) -> list[TimedStep]:
    """Run a step along each path on this pipeline and return its times, the best of some repetitions.

    All ranks call it. forward_seconds, backward_seconds: of a layer and a micro batch, for the simulator. sleeps:
    layers sleep for these times instead of computing.
    """
    engine = build_engine(config, groups)
    assert isinstance(engine, PipelineEngine), "one pipeline stage has no pipeline to time"
    if sleeps:
        sleep_in_layers(engine.body.stage, forward_seconds, backward_seconds)
    batch = random_step_batch(config, groups.data_rank)
    full = LayerPath.full(config.model.num_layers)
    for step in range(warmup_steps):
        engine.train_step(batch, full, step, 1e-4)
    measured = [float("inf")] * len(paths)
    for repetition in range(repetitions):  # all paths in turns, so that a disturbance meets several
        for number, path in enumerate(paths):
            step = warmup_steps + repetition * len(paths) + number
            seconds = slowest_seconds(groups, partial(engine.train_step, batch, path, step, 1e-4))
            measured[number] = min(measured[number], seconds)
    active = active_in_stages(activity_table(paths), config.parallel.pipeline_layers)
    simulated = pipeline_seconds(
        active * forward_seconds, active * backward_seconds, config.batch.accumulation, schedule="deepspeed"
    )
    return [TimedStep(*times) for times in zip(measured, simulated.max(axis=-1).tolist(), strict=True)]
