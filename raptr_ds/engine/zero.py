"""Data and tensor parallel training with ZeRO 0 to 3, on DeepSpeed's engine."""

from collections.abc import Iterator
from typing import Any

import torch

from raptr_ds.data.batch import StepBatch
from raptr_ds.engine.deepspeed_engine import build_deepspeed_engine
from raptr_ds.engine.deepspeed_state import DeepSpeedState
from raptr_ds.model.stage import Stage
from raptr_ds.parallel.dropout import DropoutStreams
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.paths.path import LayerPath


class ZeroEngine(DeepSpeedState):
    """Trains a whole model (tensor-parallel or not) on each data-parallel rank."""

    def __init__(
        self, config: dict[str, Any], stage: Stage, groups: ProcessGroups, seed: int, skipped_update: str
    ) -> None:
        super().__init__(build_deepspeed_engine(config, stage, stage, groups), stage, groups, seed, skipped_update)

    def _prepare(self, batch: StepBatch) -> None:
        """Set DeepSpeed's number of micro batches in this step; it counts them to know when to reduce and step."""
        num_micro_batches = len(batch.micro_batches)
        if self.engine.gradient_accumulation_steps() != num_micro_batches:
            self.engine._config.gradient_accumulation_steps = num_micro_batches
            self.engine.micro_steps = 0  # a step ends when this count is a multiple of the number of micro batches

    def _run(self, batch: StepBatch, path: LayerPath, weight: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
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
        return self.summed_over_data(total).double() / (num_micro_batches * self.groups.topology.data)

    def _losses(self, batch: StepBatch, path: LayerPath) -> Iterator[torch.Tensor]:
        for micro in batch.micro_batches:
            yield self.engine.module(micro.tokens, micro, path, None).double().sum()
