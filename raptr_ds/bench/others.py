"""Other stacks in the benchmark: the same model, weights and batch, trained by DeepSpeed as its users do."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from raptr_ds.bench.megatron_stack import MegatronStack, rename_to_megatron
from raptr_ds.bench.ours import flops_of
from raptr_ds.bench.samples import Entrant, Measured, Step
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


class OtherStack(Entrant):
    """A model trained by plain DeepSpeed, data parallel, with the run's optimizer, precision and ZeRO stage.

    initial_weights: returns our engine's.
    """

    def __init__(self, config: RunConfig, batch: StepBatch, initial_weights: Callable[[], Weights]) -> None:
        self._config, self._batch, self._initial_weights = config, batch, initial_weights
        depth = config.model.num_layers
        self.rows = [Measured(self.name, "one process", depth, flops_of(config, batch, depth))]
        self.model: Any = None

    @abstractmethod
    def module(self) -> nn.Module:
        """Return the model. Raises: ConfigError for what the stack does not support."""

    @abstractmethod
    def loss(self, micro: MicroBatch) -> torch.Tensor:
        """Return the mean loss of a micro batch, through every layer."""

    def build(self) -> None:
        """Build the model under plain DeepSpeed; biases and norms have no weight decay.

        As in our engines, ZeRO 1 and 2 are off on one rank, where they would only copy. Raises: as `module`.
        """
        module = self.module()
        start_deepspeed_comm()
        parameters = list(module.train().parameters())
        groups = [
            {"params": [p for p in parameters if is_decayed(p)]},
            {"params": [p for p in parameters if not is_decayed(p)], "weight_decay": 0.0},
        ]
        options = without_idle_zero(self._config.deepspeed, dist.get_world_size())
        self.model = deepspeed.initialize(
            model=module,
            model_parameters=groups,  # type: ignore[arg-type]
            config={**options, "steps_per_print": _NOT_PRINTING},
            dist_init_required=False,
        )[0]
        self.rows[0].loss = self._evaluate()

    def next_step(self) -> tuple[Measured, Step]:
        """Return its one step."""
        return self.rows[0], self._train

    def close(self) -> None:
        """Free the model."""
        self.model = None

    @torch.no_grad()
    def _evaluate(self) -> float:
        """Return the batch's loss, the mean over all predicted positions."""
        batch = self._batch.to(self.model.device)
        self.model.eval()
        with torch.compiler.set_stance("force_eager"):  # compiling for one evaluation would take longer
            losses = [self.loss(micro).item() * micro.num_predictions for micro in batch.micro_batches]
        self.model.train()
        return sum(losses) / batch.num_predictions

    def _train(self) -> tuple[float, float]:
        """Train one step. DeepSpeed divides each loss by their number. Waits for agreement and loader are 0."""
        batch = self._batch.to(self.model.device)
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

    def __init__(
        self, config: RunConfig, batch: StepBatch, initial_weights: Callable[[], Weights], is_compiled: bool
    ) -> None:
        """is_compiled: by torch.compile, the whole model."""
        self.name += ", compiled" if is_compiled else ""
        super().__init__(config, batch, initial_weights)
        self._is_compiled = is_compiled

    def module(self) -> nn.Module:
        """Return transformers' model. Raises: ConfigError if it has no such model."""
        model = to_hugging_face(self._config.model, self._initial_weights())
        if self._is_compiled:
            model.compile(dynamic=False)
        return model

    def loss(self, micro: MicroBatch) -> torch.Tensor:
        """Return the mean loss of a micro batch."""
        return self.model(**hugging_face_inputs(self._config.model, micro)).loss


class MegatronLayersStack(OtherStack):
    """Megatron-core's transformer layers between our embedding and our head."""

    name = "megatron-core layers + DeepSpeed"

    def __init__(
        self, config: RunConfig, batch: StepBatch, initial_weights: Callable[[], Weights], groups: ProcessGroups
    ) -> None:
        super().__init__(config, batch, initial_weights)
        self._groups = groups

    def module(self) -> nn.Module:
        """Return our model with the other layers. Raises: ConfigError for what they do not support here."""
        model = self._config.model
        if model.hidden_dropout or model.attention_dropout:
            raise ConfigError("megatron-core draws its dropout from a CUDA generator; compare without dropout.")
        if self._config.parallel.activation_checkpointing:
            raise ConfigError("megatron-core's layers are compared without activation checkpointing.")
        stage = build_stage(model, self._groups, range(model.num_layers), recompute=False, seed=0)
        stage.layers = MegatronStack(self._groups, model)  # type: ignore[assignment]
        stage.load_state_dict(rename_to_megatron(self._initial_weights(), is_gated=model.activation == "swiglu"))
        return stage.to(self._groups.device)

    def loss(self, micro: MicroBatch) -> torch.Tensor:
        """Return the mean loss of a micro batch."""
        return self.model(micro.tokens, micro, LayerPath.full(self._config.model.num_layers), None).mean()
