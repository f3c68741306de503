"""Other stacks in the benchmark: the same model, weights and batch, trained by DeepSpeed as its users do."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from raptr_ds.bench.megatron_stack import MegatronStack, rename_to_megatron
from raptr_ds.bench.ours import flops_of
from raptr_ds.bench.samples import Measured, Turn
from raptr_ds.config.run import RunConfig
from raptr_ds.data.batch import MicroBatch, StepBatch
from raptr_ds.engine.deepspeed_engine import start_deepspeed_comm, without_idle_zero
from raptr_ds.engine.parameter_groups import is_decayed
from raptr_ds.errors import ConfigError
from raptr_ds.hf.model import hugging_face_inputs, to_hugging_face
from raptr_ds.model.stage import build_stage
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.paths import LayerPath

_NOT_PRINTING = 1 << 60

Weights = dict[str, torch.Tensor]


class OtherStack(ABC):
    """A model trained by plain DeepSpeed, data parallel, with the run's optimizer, precision and ZeRO stage."""

    name: str

    def __init__(self, module: nn.Module, config: RunConfig) -> None:
        """Train `module` in place; biases and norms have no weight decay.

        As in our engines, ZeRO 1 and 2 are off on one rank, where they would only copy.
        """
        start_deepspeed_comm()
        parameters = list(module.train().parameters())
        groups = [
            {"params": [p for p in parameters if is_decayed(p)]},
            {"params": [p for p in parameters if not is_decayed(p)], "weight_decay": 0.0},
        ]
        options = without_idle_zero(config.deepspeed, dist.get_world_size())
        self.model: Any = deepspeed.initialize(
            model=module,
            model_parameters=groups,  # type: ignore[arg-type]
            config={**options, "steps_per_print": _NOT_PRINTING},
            dist_init_required=False,
        )[0]

    @abstractmethod
    def loss(self, micro: MicroBatch) -> torch.Tensor:
        """Return the mean loss of a micro batch, through every layer."""

    @torch.no_grad()
    def evaluate(self, batch: StepBatch) -> float:
        """Return the batch's loss, the mean over all predicted positions."""
        batch = batch.to(self.model.device)
        self.model.eval()
        with torch.compiler.set_stance("force_eager"):  # compiling for one evaluation would take longer
            losses = [self.loss(micro).item() * micro.num_predictions for micro in batch.micro_batches]
        self.model.train()
        return sum(losses) / batch.num_predictions

    def train(self, batch: StepBatch) -> tuple[float, float]:
        """Train one step. DeepSpeed divides each loss by their number. Waits for agreement and loader are 0."""
        batch = batch.to(self.model.device)
        share = len(batch.micro_batches) / batch.num_predictions
        total = torch.zeros((), device=self.model.device)
        for micro in batch.micro_batches:
            loss = self.loss(micro) * (micro.num_predictions * share)
            self.model.backward(loss)
            self.model.step()
            total += loss.detach()
        total.item()  # as every training loop, which reports the loss
        return 0.0, 0.0


class HuggingFaceStack(OtherStack):
    """The same model in transformers, which computes the logits of every position."""

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


class MegatronLayersStack(OtherStack):
    """Megatron-core's transformer layers between our embedding and our head."""

    name = "megatron-core layers + DeepSpeed"

    def __init__(self, config: RunConfig, weights: Weights, groups: ProcessGroups) -> None:
        """Raises: ConfigError for what the layers do not support here."""
        model = config.model
        if model.hidden_dropout or model.attention_dropout:
            raise ConfigError("megatron-core draws its dropout from a CUDA generator; compare without dropout.")
        if config.parallel.activation_checkpointing:
            raise ConfigError("megatron-core's layers are compared without activation checkpointing.")
        assert model.ffn_hidden_size is not None
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


class OtherEntrant:
    """Another stack, through all layers."""

    def __init__(self, name: str, make: Callable[[], OtherStack], config: RunConfig, batch: StepBatch) -> None:
        """make: builds the stack, with our engine's initial weights."""
        self.name, self._make, self._batch = name, make, batch
        depth = config.model.num_layers
        self.rows = [Measured(name, "one process", depth, flops_of(config, batch, depth))]
        self._stack: OtherStack | None = None

    def build(self) -> None:
        """Build the model under plain DeepSpeed. Raises: ConfigError for what the stack does not support."""
        self._stack = self._make()
        self.rows[0].loss = self._stack.evaluate(self._batch)

    def begin_round(self, is_first_to_count: bool) -> None:
        """Do nothing."""

    def turns(self) -> list[Turn]:
        """Return its one step."""
        stack = self._stack
        assert stack is not None
        return [lambda: (self.rows[0], lambda: stack.train(self._batch))]

    def end_of_timing(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Free the model."""
        self._stack = None
