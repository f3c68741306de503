"""What both DeepSpeed engines share: the loss's weight and scale, a step's result, the state by parameter name."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from raptr_ds.data.batch import StepBatch
from raptr_ds.engine.fragments import Fragment, Holder, create_state, fragments_of, step_counts
from raptr_ds.engine.grow import grow_layers
from raptr_ds.engine.parameter_groups import every_layer, layers_on, set_learning_rate
from raptr_ds.engine.protocol import StepResult
from raptr_ds.engine.replicated import ReplicatedOptimizer
from raptr_ds.engine.work_clock import WorkClock
from raptr_ds.model.stage import Stage
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.parallel.layers import is_owner
from raptr_ds.paths.growth import Growth
from raptr_ds.paths.path import LayerPath

_LOSS_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class DeepSpeedState:
    """The methods of `Engine` that do not depend on pipeline stages."""

    def __init__(self, engine: Any, stage: Stage, groups: ProcessGroups, skipped_update: str) -> None:
        self.engine, self.stage, self.groups = engine, stage, groups
        self.clock: WorkClock = engine.clock
        self.names = {parameter: name for name, parameter in stage.named_parameters()}
        self.parameters = {name: parameter for parameter, name in self.names.items()}
        self.freezes = skipped_update == "freeze"

    def begin_step(self, path: LayerPath, learning_rate: float) -> None:
        """Prepare for a training step along `path`; only the weights of its layers are gathered."""
        set_learning_rate(self.engine.basic_optimizer, learning_rate)
        optimizer = self.engine.optimizer
        optimizer.follow(path, self.freezes)
        optimizer.gather(layers_on(path))

    def begin_evaluation(self, path: LayerPath) -> None:
        """Prepare for forward passes along `path` without backward passes."""
        optimizer = self.engine.optimizer
        optimizer.follow_forward(path)
        optimizer.gather(layers_on(path))

    def count_predictions(self, batch: StepBatch) -> torch.Tensor:
        """Return the predicted positions of the global batch, an fp64 scalar on the device."""
        # Filled by a kernel: copying a number from the host would wait for the device.
        count = torch.full((), batch.num_predictions, dtype=torch.float64, device=self.groups.device)
        return self.summed_over_data(count)

    def summed_over_data(self, values: torch.Tensor) -> torch.Tensor:
        """Return `values` summed over the data-parallel ranks, in place."""
        if self.groups.topology.data > 1:
            dist.all_reduce(values, group=self.groups.data)
        return values

    def loss_weight(self, batch: StepBatch, num_predictions: torch.Tensor) -> torch.Tensor:
        """Return the factor of a micro batch's summed loss.

        DeepSpeed averages over micro batches and data-parallel ranks; with this factor the average is the mean over
        the predicted positions of the global batch, however the batch is split.
        """
        return (len(batch.micro_batches) * self.groups.topology.data / num_predictions).float()

    def scale_gradient(self, loss: torch.Tensor) -> None:
        """Apply fp16's loss scale at ZeRO stage 0; at other stages DeepSpeed applies it."""
        optimizer = self.engine.optimizer
        if isinstance(optimizer, ReplicatedOptimizer) and optimizer.loss_scale != 1.0:
            scale = optimizer.loss_scale
            loss.register_hook(lambda gradient: gradient * scale)

    def result(self, loss: torch.Tensor, share: int, num_predictions: torch.Tensor) -> StepResult:
        """Return the step's result after DeepSpeed's step: the only place where a training step waits for the device.

        loss: a scalar on the device, `share` times the mean over the global batch.
        """
        optimizer = self.engine.optimizer
        norm = optimizer._global_grad_norm  # a number if ZeRO 1 to 3 have found it not finite, else a tensor
        on_device = [loss, num_predictions, *([norm] if isinstance(norm, torch.Tensor) else [])]
        total, count, *norms = read_back(torch.stack([value.double() for value in on_device]))
        norm = norms[0] if norms else float(norm)
        optimizer.finish_step(norm)
        return StepResult(
            loss=total / share,
            num_predictions=int(count),
            grad_norm=norm if norm >= 0 else float("nan"),
            skipped=bool(optimizer.overflow),
            own_seconds=self.clock.end_step(),
        )

    def _holders(self) -> list[Holder]:
        return self.engine.optimizer.holders(self.names)

    def fragments(self) -> list[Fragment]:
        """Return views of all fp32 weights and optimizer states that this rank holds."""
        return fragments_of(self._holders(), self.engine.basic_optimizer)

    def grow(self, growth: Growth) -> None:
        """Give the new layers the weights and the optimizer state that they begin with."""
        grow_layers(self._holders(), self.engine.basic_optimizer, growth, self.groups)
        self.engine.optimizer.refresh(growth.new_layers.__contains__)

    def owns(self, fragment: Fragment) -> bool:
        """Whether this rank writes the fragment: ZeRO's partitions have one owner each; of replicas it is rank 0."""
        if isinstance(self.engine.optimizer, ReplicatedOptimizer) and self.groups.data_rank > 0:
            return False
        return is_owner(self.parameters[fragment.name], self.groups)

    def step_counts(self) -> dict[str, float]:
        """Return how many steps the optimizer has made on each parameter of this rank."""
        return step_counts(self._holders(), self.engine.basic_optimizer)

    def create_state(self, kinds: Mapping[str, set[str]], counts: Mapping[str, float]) -> None:
        """Replace the optimizer's state by zeros of these kinds and by these step counts."""
        create_state(self._holders(), self.engine.basic_optimizer, kinds, counts)

    def refresh_weights(self) -> None:
        """Copy the fp32 weights to the working weights."""
        self.engine.optimizer.refresh(every_layer)

    def loss_scaler_state(self) -> dict[str, float]:
        """Return a dynamic loss scale and its counters; a static one is in the run file."""
        scaler = self.engine.optimizer.loss_scaler
        if not scaler.dynamic:
            return {}
        return {key: float(getattr(scaler, key)) for key in _LOSS_SCALER_FIELDS}

    def load_loss_scaler_state(self, values: Mapping[str, float]) -> None:
        """Restore what `loss_scaler_state` returned, if the loss scale is dynamic here."""
        scaler = self.engine.optimizer.loss_scaler
        if not scaler.dynamic:
            return
        for key, value in values.items():
            setattr(scaler, key, type(getattr(scaler, key))(value))


def read_back(values: torch.Tensor) -> list[float]:
    """Return the values on the host: the only place where a step or an evaluation waits for the device."""
    return values.tolist()
