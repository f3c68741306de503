"""Our training step in the benchmark, along paths of several lengths."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from raptr_ds.bench.samples import Entrant, Measured, Step
from raptr_ds.config.run import RunConfig
from raptr_ds.data.batch import StepBatch
from raptr_ds.data.loader import Loader
from raptr_ds.engine.build import build_engine
from raptr_ds.engine.fragments import WEIGHT
from raptr_ds.model.stage import build_stage
from raptr_ds.parallel.agreement import PathAgreement
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.paths import LayerPath
from raptr_ds.paths.balance import BalancedStages, draw_balanced
from raptr_ds.paths.path import Parts
from raptr_ds.paths.raptr import draw_uniform
from raptr_ds.planner.measure import DeviceProbe
from raptr_ds.planner.setting import setting_of
from raptr_ds.planner.step_time import Device, step_seconds
from raptr_ds.rng import stream
from raptr_ds.runtime.method import step_cost_of

_STEPS_AHEAD = 1 << 40  # agreement never reaches the run's end


class OurEntrant(Entrant):
    """Our engine; each step agrees on its path, takes a batch and trains, as the training loop does.

    The first row is the full path. The loader's batch is not used: all steps train on the same one.
    """

    name = "raptr_ds"

    def __init__(
        self, config: RunConfig, groups: ProcessGroups, layout: str, batch: StepBatch, loader: Loader | None
    ) -> None:
        self._config, self._groups, self._batch, self._loader = config, groups, batch, loader
        self.rows = [Measured(self.name, layout, work, flops_of(config, batch, work)) for work in _works(config)]
        self._weights: dict[str, torch.Tensor] | None = None
        self._engine: Any = None
        self._probe: DeviceProbe | None = None
        self._agreement: PathAgreement | None = None
        self._step = 0

    def build(self) -> None:
        """Build the engine, and the parts of a step that are timed beside it."""
        engine: Any = build_engine(self._config, self._groups)
        if self._groups.topology.world_size == 1:
            weights = (fragment for fragment in engine.fragments() if fragment.kind == WEIGHT)
            self._weights = {part.name: part.data.view(part.geometry.local_shape).cpu().clone() for part in weights}
        self.rows[0].loss = engine.evaluate([self._batch], LayerPath.full(self._config.model.num_layers))
        self._engine, self._step = engine, 0
        # Its thread never ends: what it calls must not refer to this object, which has the weights.
        path_at = partial(_path_at, self._config, [row.path_length for row in self.rows])
        self._agreement = PathAgreement(self._groups, path_at, lambda: False, _STEPS_AHEAD)
        self._probe = DeviceProbe(self._config, self._groups)

    def initial_weights(self) -> dict[str, torch.Tensor]:
        """Return the weights before the first step, on the CPU; drawn again if no engine could be built."""
        if self._weights is None:
            model, seed = self._config.model, self._config.train.seed
            stage = build_stage(model, self._groups, range(model.num_layers), recompute=False, seed=seed)
            self._weights = {name: parameter.detach() for name, parameter in stage.named_parameters()}
        return self._weights

    def begin_round(self, is_first_to_count: bool) -> None:
        """Time the device's parts of a step."""
        assert self._probe is not None
        if is_first_to_count:
            self._probe.forget()
        self._probe.sample()

    def next_step(self) -> tuple[Measured, Step]:
        """Return a step along the next path, on which all ranks agree."""
        return self.rows[_row_number(self._step, len(self.rows))], self._train

    def end_of_timing(self) -> None:
        """Predict each row's time from the parts, and free them."""
        assert self._probe is not None
        setting = setting_of(self._config, self._probe.device(Device()))
        self._probe = None
        for row in self.rows:
            path = measured_path(self._config, row.path_length, stream(0, "bench prediction"))
            row.predicted_seconds = float(step_seconds([path], setting).total[0])

    def close(self) -> None:
        """Free the engine, once the agreement has ended on every rank; all ranks call it."""
        self._engine = self._probe = None
        if self._agreement is not None:
            self._agreement.restart()
            self._agreement = None

    def _train(self) -> tuple[float, float]:
        """Train the next step; return the seconds that it waited for agreement and loader."""
        assert self._agreement is not None
        start = time.perf_counter()
        path = self._agreement.at(self._step).path
        agreed = time.perf_counter()
        if self._loader is not None:
            self._loader.at(self._step)
        loaded = time.perf_counter()
        self._engine.train_step(self._batch, path, self._step, self._config.optimizer["params"]["lr"])
        self._step += 1
        return agreed - start, loaded - agreed


def _row_number(step: int, num_rows: int) -> int:
    """Return which row a step belongs to: they take turns, in another order in each round."""
    number, turn = divmod(step, num_rows)
    return int(stream(0, "bench order", number).permutation(num_rows)[turn])


def _path_at(config: RunConfig, works: Sequence[float], step: int) -> LayerPath:
    work = works[_row_number(step, len(works))]
    return measured_path(config, work, stream(0, "bench", step))


def measured_path(config: RunConfig, work: float, generator: np.random.Generator) -> LayerPath:
    """Return a random path that costs `work` whole layers.

    So many layers, balanced over the pipeline's stages; with path.method width all layers, at this share of their
    width.
    """
    num_layers, heads = config.model.num_layers, config.model.num_attention_heads
    if config.path.method != "width":
        stages = BalancedStages(config.parallel.pipeline_layers)
        return LayerPath(draw_balanced(generator, stages, round(work), ()), num_layers)
    width = round(work / num_layers * heads)
    drawn = [tuple(draw_uniform(generator, heads, width) for _ in range(num_layers)) for _ in range(2)]
    return LayerPath(tuple(range(num_layers)), num_layers, parts=Parts(heads, *drawn))


def flops_of(config: RunConfig, batch: StepBatch, path_length: float) -> int:
    """Return the FLOPs of a step of the whole job along a path of this length, balanced over the pipeline's stages."""
    predictions = batch.num_predictions * config.batch.data_parallel
    return round(step_cost_of(config).expected_flops(path_length, predictions))


def _works(config: RunConfig) -> list[float]:
    """Return L, 3L/4 and L/2 without repetitions; where layers run in parts, the work of these shares of the heads."""
    depth = config.model.num_layers
    parts = config.model.num_attention_heads if config.path.method == "width" else depth
    counts = sorted({parts, max(1, 3 * parts // 4), max(1, parts // 2)}, reverse=True)
    return [count * depth / parts for count in counts]
