"""Pipeline-parallel training (with tensor and data parallel, ZeRO 0 and 1), on DeepSpeed's pipeline engine."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from raptr_ds.data.batch import MicroBatch, StepBatch
from raptr_ds.engine.deepspeed_engine import PipelineStages, build_deepspeed_engine
from raptr_ds.engine.deepspeed_state import DeepSpeedState, read_back
from raptr_ds.engine.protocol import StepResult
from raptr_ds.engine.tied_gradient import TiedGradient
from raptr_ds.model.stage import Stage
from raptr_ds.parallel.dropout import DropoutStreams, dropout_keys
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.paths.path import LayerPath


class _StepBody(nn.Module):
    """Runs the stage on the step's micro batches, in order.

    Stages send each other only the residual stream: batches are pure functions of (seed, step, data-parallel rank),
    so that every stage has masks and sample ids itself.
    """

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage
        self.dropout_keys: torch.Tensor | None = None
        self.weight = torch.ones(())
        self.waiting: Iterator[tuple[MicroBatch, LayerPath]] = iter(())
        self.observe_loss: Callable[[torch.Tensor], None] = lambda _loss: None
        self.scale_gradient: Callable[[torch.Tensor], None] = lambda _loss: None
        self.working: Callable[[], AbstractContextManager[None]] = nullcontext

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        micro, path = next(self.waiting)
        streams = None if self.dropout_keys is None else DropoutStreams(self.dropout_keys, micro.sample_ids)
        with self.working():
            x = self.stage(x, micro, path, streams)
        if not self.stage.is_last:
            return x
        loss = x.sum() * self.weight
        if loss.requires_grad:
            self.observe_loss(loss)
            self.scale_gradient(loss)
        return loss


class PipelineEngine(DeepSpeedState):
    """Trains a model whose layers are divided among pipeline stages."""

    def __init__(
        self, config: dict[str, Any], stage: Stage, groups: ProcessGroups, seed: int, skipped_update: str
    ) -> None:
        self.body = _StepBody(stage)
        self.seed = seed
        module = PipelineStages(self.body, groups)
        super().__init__(build_deepspeed_engine(config, stage, module, groups), stage, groups, skipped_update)
        engine: Any = self.engine
        if groups.sequence_parallel:
            # DeepSpeed lets each tensor rank send a part of what all have and gathers it; here ranks have own parts.
            engine.is_pipe_partitioned = engine.is_grad_partitioned = False
        if groups.embedding is not None and stage.embedding is not None and stage.model.tie_word_embeddings:
            engine.tied = TiedGradient(stage.embedding.word, groups, dtype=engine.get_data_types()[1])
        self.body.observe_loss = engine.observe_loss
        self.body.scale_gradient = self.scale_gradient
        self.body.working = self.clock.working

    def train_step(self, batch: StepBatch, path: LayerPath, step: int, learning_rate: float) -> StepResult:
        """Train step `step` along `path`."""
        engine: Any = self.engine
        self.begin_step(path, learning_rate)
        if engine.tied is not None:
            engine.tied.begin(batch)
        batch = batch.to(self.groups.device)
        count = self.count_predictions(batch)
        keys = dropout_keys(self.seed, step, self.stage.model.num_layers, self.groups.device)
        self._prepare(batch, path, self.loss_weight(batch, count), keys)
        self.clock.begin_step()
        # DeepSpeed averages the weighted losses over micro batches and data-parallel ranks, which gives the mean over
        # the global batch's predicted positions, and broadcasts it to all stages.
        loss = engine.train_batch(self._inputs(batch))
        return self.result(loss, 1, count)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[StepBatch], path: LayerPath) -> float:
        """Return the mean loss over all predicted positions of `batches` along `path`."""
        self.begin_evaluation(path)
        total = torch.zeros((), dtype=torch.float64, device=self.groups.device)
        count = 0
        for given in batches:
            batch = given.to(self.groups.device)
            self._prepare(batch, path, torch.ones((), device=self.groups.device), None)
            micro_batches = len(batch.micro_batches)
            mean = self.engine.eval_batch(self._inputs(batch), num_micro_batches=micro_batches)
            total += mean.double().sum() * (micro_batches * self.groups.topology.data)  # of one element
            count += given.num_predictions
        counted = self.summed_over_data(torch.full_like(total, count))
        loss, predictions = read_back(torch.stack([total, counted]))
        return loss / predictions

    def _prepare(self, batch: StepBatch, path: LayerPath, weight: torch.Tensor, keys: torch.Tensor | None) -> None:
        self.body.weight, self.body.dropout_keys = weight, keys
        count = len(batch.micro_batches)
        self.body.waiting = iter((micro, path.of_micro_batch(n, count)) for n, micro in enumerate(batch.micro_batches))

    @staticmethod
    def _inputs(batch: StepBatch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (inputs, labels) as DeepSpeed's first and last stage load them; labels are not used."""
        return ((micro.tokens, micro.tokens) for micro in batch.micro_batches)
