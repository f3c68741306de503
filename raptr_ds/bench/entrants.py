"""The benchmark's entrants: who is built, has steps to make in every round, and gives all memory back."""

import gc
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch

from raptr_ds.bench.contestants import Contestant, HuggingFaceStep, MegatronStep, OurStep, Weights, measured_path
from raptr_ds.bench.samples import Measured, Step
from raptr_ds.config.load import RunConfig
from raptr_ds.data.batch import StepBatch
from raptr_ds.data.loader import Loader
from raptr_ds.engine.build import build_engine
from raptr_ds.engine.fragments import WEIGHT
from raptr_ds.model.stage import build_stage
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.paths import LayerPath
from raptr_ds.planner.measure import DeviceProbe
from raptr_ds.planner.setting import setting_of
from raptr_ds.planner.step_time import Device
from raptr_ds.rng import stream
from raptr_ds.runtime.method import step_cost_of

Turn = Callable[[], tuple[Measured, Step]]
"""Returns the row that the entrant's next step belongs to, and the step."""


class Entrant(Protocol):
    """One that takes part, with the rows that its steps fill."""

    name: str
    rows: list[Measured]

    def build(self) -> None:
        """Take memory and evaluate the batch. Raises: ConfigError for what the entrant cannot do."""
        ...

    def begin_round(self, is_first_to_count: bool) -> None:
        """Do what belongs to a round and to no step."""
        ...

    def turns(self) -> list[Turn]:
        """Return the steps of a round, as many as there are rows; they may be taken in any order."""
        ...

    def end_of_timing(self) -> None:
        """Do what follows the last step that is timed."""
        ...

    def close(self) -> None:
        """Give all memory back; a second time it does nothing."""
        ...


def free_memory(device: torch.device) -> None:
    """Let go of what nobody refers to any more, and hand it back to the device."""
    torch._dynamo.reset()  # compiled code refers to what it was compiled for
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class OurEntrant:
    """Our engine, along paths of some lengths; the first is the full one."""

    name = "raptr_ds"

    def __init__(
        self, config: RunConfig, groups: ProcessGroups, layout: str, batch: StepBatch, loader: Loader | None
    ) -> None:
        self._config, self._groups, self._batch, self._loader = config, groups, batch, loader
        self.rows = [Measured(self.name, layout, length, _flops(config, batch, length)) for length in _lengths(config)]
        self._ours: OurStep | None = None
        self._probe: DeviceProbe | None = None
        self._weights: Weights | None = None

    def build(self) -> None:
        """Build the engine, and the pieces of a step that are timed beside it."""
        engine: Any = build_engine(self._config, self._groups)
        if self._groups.topology.world_size == 1:
            weights = (fragment for fragment in engine.fragments() if fragment.kind == WEIGHT)
            self._weights = {part.name: part.data.view(part.local_shape).cpu().clone() for part in weights}
        self.rows[0].loss = engine.evaluate([self._batch], LayerPath.full(self._config.model.num_layers))
        works = [row.path_length for row in self.rows]
        self._ours = OurStep(engine, self._groups, self._config, works, self._loader)
        self._probe = DeviceProbe(self._config, self._groups)

    def initial_weights(self) -> Weights:
        """Return the weights before the first step, on the CPU; drawn again where no engine could be built."""
        if self._weights is None:
            model, seed = self._config.model, self._config.train.seed
            stage = build_stage(model, self._groups, range(model.num_layers), recompute=False, seed=seed)
            self._weights = {name: parameter.detach() for name, parameter in stage.named_parameters()}
        return self._weights

    def begin_round(self, is_first_to_count: bool) -> None:
        """Time the device's pieces of a step."""
        assert self._probe is not None
        if is_first_to_count:
            self._probe.forget()
        self._probe.sample()

    def turns(self) -> list[Turn]:
        """Return a turn for each path; which of them is next, the agreement of all ranks knows."""
        return [self._next] * len(self.rows)

    def _next(self) -> tuple[Measured, Step]:
        ours = self._ours
        assert ours is not None
        return next(row for row in self.rows if row.path_length == ours.next_work), partial(ours.run, self._batch)

    def end_of_timing(self) -> None:
        """Predict each row's time from the pieces, and let go of them."""
        assert self._probe is not None
        setting = setting_of(self._config, self._probe.device(Device()))
        self._probe = None
        for row in self.rows:
            path = measured_path(self._config, row.path_length, stream(0, "bench prediction"))
            row.predicted_seconds = float(setting.seconds([path]).total[0])

    def close(self) -> None:
        """Give the engine's memory back."""
        ours, self._ours, self._probe = self._ours, None, None
        if ours is not None:
            ours.close()


class OtherEntrant:
    """Another stack, through all layers."""

    def __init__(
        self, name: str, make: Callable[[], Contestant], config: RunConfig, groups: ProcessGroups, batch: StepBatch
    ) -> None:
        """make: from the weights of our engine before its first step."""
        self.name, self._make, self._groups, self._batch = name, make, groups, batch
        depth = config.model.num_layers
        self.rows = [Measured(name, "one process", depth, _flops(config, batch, depth))]
        self._contestant: Contestant | None = None

    def build(self) -> None:
        """Build the model under plain DeepSpeed."""
        self._contestant = self._make()
        self.rows[0].loss = _evaluate(self._contestant, self._batch.to(self._groups.device))

    def begin_round(self, is_first_to_count: bool) -> None:
        """Do nothing."""

    def turns(self) -> list[Turn]:
        """Return its one step."""
        contestant = self._contestant
        assert contestant is not None
        return [lambda: (self.rows[0], partial(_run, contestant, self._batch))]

    def end_of_timing(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Give the model's memory back."""
        self._contestant = None


def entrants_of(
    config: RunConfig, groups: ProcessGroups, layout: str, batch: StepBatch, loader: Loader | None, compile_others: bool
) -> list[Entrant]:
    """Return ours first, and in one process the others, on the same weights; nothing is built yet."""
    ours = OurEntrant(config, groups, layout, batch, loader)
    if groups.topology.world_size > 1:
        return [ours]
    hugging_face = HuggingFaceStep.name + (", compiled" if compile_others else "")
    makers: dict[str, Callable[[], Contestant]] = {
        hugging_face: lambda: HuggingFaceStep(config, ours.initial_weights(), compile_others),
        MegatronStep.name: lambda: MegatronStep(config, ours.initial_weights(), groups),
    }
    return [ours, *(OtherEntrant(name, make, config, groups, batch) for name, make in makers.items())]


def _lengths(config: RunConfig) -> list[float]:
    """Return L, 3L/4 and L/2, those that differ; where layers run in parts, the work of these shares of the heads."""
    depth = config.model.num_layers
    parts = config.model.num_attention_heads if config.path.method == "width" else depth
    counts = sorted({parts, max(1, 3 * parts // 4), max(1, parts // 2)}, reverse=True)
    return [count * depth / parts for count in counts]


def _flops(config: RunConfig, batch: StepBatch, path_length: float) -> int:
    predictions = batch.num_predictions * config.batch.data_parallel
    return round(step_cost_of(config).expected_flops(path_length, predictions))  # the benchmark's paths are balanced


@torch.no_grad()
def _evaluate(other: Contestant, batch: StepBatch) -> float:
    other.model.eval()
    with torch.compiler.set_stance("force_eager"):  # a graph of its own, compiled for one evaluation
        losses = [other.loss(micro).item() * micro.num_predictions for micro in batch.micro_batches]
    other.model.train()
    return sum(losses) / batch.num_predictions


def _run(other: Contestant, batch: StepBatch) -> tuple[float, float]:
    other.run(batch)
    return 0.0, 0.0
