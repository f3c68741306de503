"""Data and tensor parallel training with ZeRO 0 to 3, on DeepSpeed's engine."""

from collections.abc import Iterable
from typing import Any

import torch

from raptr_ds.data.batch import StepBatch
from raptr_ds.engine.deepspeed_engine import build_deepspeed_engine
from raptr_ds.engine.deepspeed_state import DeepSpeedState, read_back
from raptr_ds.engine.protocol import StepResult
from raptr_ds.model.stage import Stage
from raptr_ds.parallel.dropout import DropoutStreams, dropout_keys
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.paths.path import LayerPath


class ZeroEngine(DeepSpeedState):
    """Trains a whole model (tensor-parallel or not) on each data-parallel rank."""

    def __init__(
        self, config: dict[str, Any], stage: Stage, groups: ProcessGroups, seed: int, skipped_update: str
    ) -> None:
        self.groups, self.seed = groups, seed
        super().__init__(build_deepspeed_engine(config, stage, stage, groups), stage, groups, skipped_update)

    def train_step(self, batch: StepBatch, path: LayerPath, step: int, learning_rate: float) -> StepResult:
        """Train step `step` along `path`."""
        engine: Any = self.engine
        self.begin_step(path, learning_rate)
        self._accumulate_over(len(batch.micro_batches))
        batch = batch.to(self.groups.device)
        count = self.count_predictions(batch)
        self.clock.begin_step()
        if not (self.clock.is_on_device and engine.zero_optimization_stage() == 3):
            self.clock.start()  # else each gather of a module's weights would have to be left out by two events
        weight = self.loss_weight(batch, count)
        total = torch.zeros((), device=self.groups.device)
        keys = dropout_keys(self.seed, step, self.stage.model.num_layers, self.groups.device)
        for number, micro in enumerate(batch.micro_batches):
            streams = DropoutStreams(keys, micro.sample_ids)
            taken = path.of_micro_batch(number, len(batch.micro_batches))
            engine.optimizer.follow_micro_batch(taken)
            loss = engine(micro.tokens, micro, taken, streams).sum() * weight
            engine.observe_loss(loss)
            self.scale_gradient(loss)
            engine.backward(loss)
            engine.step()
            total += loss.detach()
        self.clock.stop()
        self.summed_over_data(total)
        return self.result(total, len(batch.micro_batches) * self.groups.topology.data, count)

    def _accumulate_over(self, num_micro_batches: int) -> None:
        """Set DeepSpeed's number of micro batches in this step; it counts them to know when to reduce and step."""
        engine: Any = self.engine
        if engine.gradient_accumulation_steps() != num_micro_batches:
            engine._config.gradient_accumulation_steps = num_micro_batches
            engine.micro_steps = 0  # a step ends when this count is a multiple of the number of micro batches

    @torch.no_grad()
    def evaluate(self, batches: Iterable[StepBatch], path: LayerPath) -> float:
        """Return the mean loss over all predicted positions of `batches` along `path`."""
        self.begin_evaluation(path)
        total = torch.zeros((), dtype=torch.float64, device=self.groups.device)
        count = 0
        for batch in batches:
            count += batch.num_predictions
            for micro in batch.to(self.groups.device).micro_batches:
                total += self.engine.module(micro.tokens, micro, path, None).double().sum()
        sums = torch.stack([total, torch.full_like(total, count)])
        loss, predictions = read_back(self.summed_over_data(sums))
        return loss / predictions
