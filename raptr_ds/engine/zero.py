"""Data and tensor parallel training with ZeRO 0 to 3, on DeepSpeed's engine; pipeline.py adds pipeline stages."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from raptr_ds.data.batch import StepBatch
from raptr_ds.engine.deepspeed_engine import build_deepspeed_engine
from raptr_ds.engine.fragments import Fragment, Holder
from raptr_ds.engine.grow import grow_layers
from raptr_ds.engine.parameter_groups import every_layer
from raptr_ds.engine.protocol import Engine, StepResult
from raptr_ds.engine.replicated import ReplicatedOptimizer
from raptr_ds.engine.work_clock import WorkClock
from raptr_ds.model.stage import Stage
from raptr_ds.parallel.dropout import DropoutStreams, dropout_keys
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.parallel.layers import is_owner
from raptr_ds.paths.growth import Growth
from raptr_ds.paths.path import LayerPath

_LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class ZeroEngine(Engine):
    """Trains the model, whole or tensor-parallel, on each data-parallel rank.

    Pipeline stages change only how DeepSpeed runs a batch: `_prepare`, `_run` and `_losses`.
    """

    def __init__(
        self,
        config: dict[str, Any],
        stage: Stage,
        groups: ProcessGroups,
        seed: int,
        skipped_update: str,
        module: nn.Module | None = None,
    ) -> None:
        """module: what DeepSpeed runs, if that is not `stage` itself."""
        self.stage, self.groups, self.seed = stage, groups, seed
        self.engine: Any = build_deepspeed_engine(config, stage, stage if module is None else module, groups)
        self.optimizer: Any = self.engine.optimizer
        self.inner_optimizer = self.engine.basic_optimizer
        self.clock: WorkClock = self.engine.clock
        self.names = {parameter: name for name, parameter in stage.named_parameters()}
        self.parameters = {name: parameter for parameter, name in self.names.items()}
        self.freezes = skipped_update == "freeze"

    def train_step(self, batch: StepBatch, path: LayerPath, step: int, learning_rate: float) -> StepResult:
        for group in self.inner_optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.follow(path, self.freezes)
        self._prepare(batch)
        batch = batch.to(self.groups.device)
        # Filled by a kernel: copying a number from the host would wait for the device.
        count = torch.full((), batch.num_predictions, dtype=torch.float64, device=self.groups.device)
        self._summed_over_data(count)
        # DeepSpeed averages over micro batches and data-parallel ranks. Of losses with this factor the average is the
        # mean over the predicted positions of the global batch, however the batch is split.
        weight = (len(batch.micro_batches) * self.groups.topology.data / count).float()
        keys = dropout_keys(self.seed, step, self.stage.model.num_layers, self.groups.device)
        self.clock.begin_step()
        return self._result(self._run(batch, path, weight, keys), count)

    def _prepare(self, batch: StepBatch) -> None:
        """Prepare for a training step on `batch`, which is on the host.

        DeepSpeed counts micro batches to know when to reduce and step.
        """
        num_micro_batches = len(batch.micro_batches)
        if self.engine.gradient_accumulation_steps() != num_micro_batches:
            self.engine._config.gradient_accumulation_steps = num_micro_batches
            self.engine.micro_steps = 0  # a step ends when this count is a multiple of the number of micro batches

    def _run(self, batch: StepBatch, path: LayerPath, weight: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Run a step's forward and backward passes and DeepSpeed's step; return the global batch's mean loss, a scalar.

        weight: the factor of a micro batch's summed loss. keys: of the step's dropout.
        """
        if not (self.clock.is_on_device and self.engine.zero_optimization_stage() == 3):
            self.clock.start()  # else each gather of a module's weights would have to be left out by two events
        num_micro_batches = len(batch.micro_batches)
        total = torch.zeros((), device=self.groups.device)
        for number, micro in enumerate(batch.micro_batches):
            taken = path.of_micro_batch(number, num_micro_batches)
            self.optimizer.follow_micro_batch(taken)
            loss = self.engine(micro.tokens, micro, taken, DropoutStreams(keys, micro.sample_ids)).sum() * weight
            self.observe(loss)
            self.engine.backward(loss)
            self.engine.step()
            total += loss.detach()
        self.clock.stop()
        return self._summed_over_data(total).double() / (num_micro_batches * self.groups.topology.data)

    def observe(self, loss: torch.Tensor) -> None:
        """Note a micro batch's loss, a scalar, before its backward pass: all ranks skip the step if it is not finite.

        fp16's loss scale is applied here at ZeRO stage 0; at other stages DeepSpeed applies it.
        """
        self.optimizer.loss_check.observe(loss)
        if isinstance(self.optimizer, ReplicatedOptimizer) and self.optimizer.loss_scale != 1.0:
            scale = self.optimizer.loss_scale
            loss.register_hook(lambda gradient: gradient * scale)

    def _summed_over_data(self, values: torch.Tensor) -> torch.Tensor:
        """Return `values` summed over the data-parallel ranks, in place."""
        if self.groups.topology.data > 1:
            dist.all_reduce(values, group=self.groups.data)
        return values

    def _result(self, loss: torch.Tensor, num_predictions: torch.Tensor) -> StepResult:
        """Return the result after DeepSpeed's step: the only place where a training step waits for the device."""
        norm = self.optimizer._global_grad_norm  # a number if ZeRO 1 to 3 have found it not finite, else a tensor
        on_device = [loss, num_predictions, *([norm] if isinstance(norm, torch.Tensor) else [])]
        mean, count, *norms = read_back(torch.stack([value.double() for value in on_device]))
        norm = norms[0] if norms else float(norm)
        self.optimizer.finish_step(norm)
        return StepResult(
            loss=mean,
            num_predictions=int(count),
            grad_norm=norm if norm >= 0 else float("nan"),
            skipped=bool(self.optimizer.overflow),
            own_seconds=self.clock.end_step(),
        )

    @torch.no_grad()
    def evaluate(self, batches: Iterable[StepBatch], path: LayerPath) -> float:
        self.optimizer.follow_forward(path)
        total = torch.zeros((), dtype=torch.float64, device=self.groups.device)
        count = 0
        for batch in batches:
            for loss in self._losses(batch.to(self.groups.device), path):
                total += loss
            count += batch.num_predictions
        loss, predictions = read_back(self._summed_over_data(torch.stack([total, torch.full_like(total, count)])))
        return loss / predictions

    def _losses(self, batch: StepBatch, path: LayerPath) -> Iterator[torch.Tensor]:
        """Yield losses without dropout, fp64 scalars; summed over data-parallel ranks they are the batch's losses."""
        for micro in batch.micro_batches:
            yield self.engine.module(micro.tokens, micro, path, None).double().sum()

    def _holders(self) -> list[Holder]:
        return self.optimizer.holders(self.names)

    def grow(self, growth: Growth) -> None:
        grow_layers(self._holders(), self.inner_optimizer, growth, self.groups)
        self.optimizer.refresh(growth.new_layers.__contains__)

    def owns(self, fragment: Fragment) -> bool:
        if isinstance(self.optimizer, ReplicatedOptimizer) and self.groups.data_rank > 0:
            return False  # rank 0 writes replicas; ZeRO's partitions have one owner each
        return is_owner(self.parameters[fragment.name], self.groups)

    def refresh_weights(self) -> None:
        self.optimizer.refresh(every_layer)

    def loss_scaler_state(self) -> dict[str, float]:
        scaler = self.optimizer.loss_scaler
        if not scaler.dynamic:
            return {}  # a static one is in the run file
        return {key: float(getattr(scaler, key)) for key in _LOSS_SCALER_FIELDS}

    def load_loss_scaler_state(self, values: Mapping[str, float]) -> None:
        scaler = self.optimizer.loss_scaler
        if not scaler.dynamic:
            return
        for key, value in values.items():
            setattr(scaler, key, type(getattr(scaler, key))(value))


def read_back(values: torch.Tensor) -> list[float]:
    """Return the values on the host: the only place where a step or an evaluation waits for the device."""
    return values.tolist()
