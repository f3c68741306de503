"""Who takes part in the benchmark: our training step, and two other stacks on the same weights and batch."""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from raptr_ds.bench.megatron_stack import MegatronStack, rename_to_megatron
from raptr_ds.bench.plain_deepspeed import PlainDeepSpeed
from raptr_ds.config.load import RunConfig
from raptr_ds.data.batch import MicroBatch, StepBatch
from raptr_ds.data.loader import Loader
from raptr_ds.engine.protocol import Engine
from raptr_ds.errors import ConfigError
from raptr_ds.hf.model import hugging_face_inputs, to_hugging_face
from raptr_ds.model.stage import build_stage
from raptr_ds.parallel.agreement import PathAgreement
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.paths import LayerPath
from raptr_ds.paths.balance import BalancedStages, draw_balanced
from raptr_ds.paths.path import Parts
from raptr_ds.paths.raptr import draw_uniform
from raptr_ds.rng import stream

_STEPS_AHEAD = 1 << 40  # agreement never reaches the run's end

Weights = dict[str, torch.Tensor]


class OurStep:
    """A training step as the training loop makes it: agree on the path, take the batch, then the engine's step."""

    def __init__(
        self,
        engine: Engine,
        groups: ProcessGroups,
        config: RunConfig,
        works: Sequence[float],
        loader: Loader | None,
    ) -> None:
        self._engine, self._config, self._works, self._loader = engine, config, works, loader
        self._agreement = PathAgreement(groups, self._words_at, LayerPath.decode, lambda: False, _STEPS_AHEAD)
        self._step = 0

    def _work_at(self, step: int) -> float:
        """Return what a step's path costs: the works take turns, in another order in each round."""
        number, turn = divmod(step, len(self._works))
        return self._works[stream(0, "bench order", number).permutation(len(self._works))[turn]]

    def _words_at(self, step: int) -> np.ndarray:
        return measured_path(self._config, self._work_at(step), stream(0, "bench", step)).encode()

    @property
    def next_work(self) -> float:
        """What the next step costs, in whole layers."""
        return self._work_at(self._step)

    def run(self, batch: StepBatch) -> tuple[float, float]:
        """Train the next step; return the seconds that agreement and loader kept it waiting.

        The loader's batch is taken and left: all steps train on the same one.
        """
        start = time.perf_counter()
        path = self._agreement.at(self._step).path
        agreed = time.perf_counter()
        if self._loader is not None:
            self._loader.at(self._step)
        loaded = time.perf_counter()
        self._engine.train_step(batch, path, self._step, self._config.optimizer["params"]["lr"])
        self._step += 1
        return agreed - start, loaded - agreed

    def close(self) -> None:
        """Wait for the agreement that runs ahead; every rank calls it, so that none leaves another alone in it.

        The engine is let go of: the agreement's thread, which does not end, refers to this object.
        """
        self._agreement.restart()
        del self._engine


def measured_path(config: RunConfig, work: float, generator: np.random.Generator) -> LayerPath:
    """Return a random path that costs `work` whole layers.

    So many layers, in balance over the pipeline's stages; with path.method width all, at this share of their width.
    """
    num_layers, heads = config.model.num_layers, config.model.num_attention_heads
    if config.path.method != "width":
        assert config.parallel.pipeline_layers is not None, "not derived"
        stages = BalancedStages.of(config.parallel.pipeline_layers)
        return LayerPath(draw_balanced(generator, stages, round(work), ()), num_layers)
    width = round(work / num_layers * heads)
    drawn = [tuple(draw_uniform(generator, heads, width, ()) for _ in range(num_layers)) for _ in range(2)]
    return LayerPath(tuple(range(num_layers)), num_layers, parts=Parts(heads, *drawn))


class Contestant(Protocol):
    """Another stack: the loss of a micro batch, and a whole training step."""

    name: str
    model: Any

    def loss(self, micro: MicroBatch) -> torch.Tensor:
        """Return the mean loss of a micro batch, through every layer."""
        ...

    def run(self, batch: StepBatch) -> float:
        """Train one step and return its loss."""
        ...


class _PlainStep(ABC):
    """A step by plain DeepSpeed with the run's own optimizer and precision, and the ZeRO stage that ours runs."""

    def __init__(self, module: nn.Module, config: RunConfig) -> None:
        self._deepspeed = PlainDeepSpeed(module.train(), config.deepspeed)
        self.model: Any = self._deepspeed.engine

    @abstractmethod
    def loss(self, micro: MicroBatch) -> torch.Tensor:
        """Return the mean loss of a micro batch."""

    def run(self, batch: StepBatch) -> float:
        """Train one step and return its loss, the mean over all predicted positions."""
        batch = batch.to(self.model.device)
        share = len(batch.micro_batches) / batch.num_predictions
        return self._deepspeed.step(self.loss(m) * (m.num_predictions * share) for m in batch.micro_batches)


class HuggingFaceStep(_PlainStep):
    """The same model in transformers, which computes the logits of every position, as its users get them."""

    name = "Hugging Face + DeepSpeed"

    def __init__(self, config: RunConfig, weights: Weights, is_compiled: bool = False) -> None:
        """is_compiled: by torch.compile, the whole model. Raises: ConfigError if transformers has no such model."""
        self._model = config.model
        model = to_hugging_face(config.model, weights)
        if is_compiled:
            model.compile(dynamic=False)
        super().__init__(model, config)

    def loss(self, micro: MicroBatch) -> torch.Tensor:
        """Return the mean loss of a micro batch."""
        return self.model(**hugging_face_inputs(self._model, micro)).loss


class MegatronStep(_PlainStep):
    """Megatron-core's transformer layers between our embedding and our head."""

    name = "megatron-core layers + DeepSpeed"

    def __init__(self, config: RunConfig, weights: Weights, groups: ProcessGroups) -> None:
        """Raises: ConfigError for what the layers cannot do here."""
        model = config.model
        if model.hidden_dropout or model.attention_dropout:
            raise ConfigError("megatron-core draws its dropout from a CUDA generator; compare without dropout.")
        if config.parallel.activation_checkpointing:
            raise ConfigError("megatron-core's layers are compared without activation checkpointing.")
        stage = build_stage(model, groups, range(model.num_layers), recompute=False, seed=0)
        names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "norm_epsilon")
        kinds = ("normalization", "activation", "add_bias_linear")
        layers = MegatronStack(groups, **{key: getattr(model, key) for key in (*names, *kinds)})
        stage.layers = layers  # type: ignore[assignment]
        stage.load_state_dict(rename_to_megatron(weights, is_gated=model.activation == "swiglu"))
        self._path = LayerPath.full(model.num_layers)
        super().__init__(stage.to(groups.device), config)

    def loss(self, micro: MicroBatch) -> torch.Tensor:
        """Return the mean loss of a micro batch."""
        return self.model(micro.tokens, micro, self._path, None).mean()
