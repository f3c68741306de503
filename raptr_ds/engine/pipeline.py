"""Pipeline-parallel training (with tensor and data parallel, ZeRO 0 and 1), on DeepSpeed's pipeline engine."""

from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.utils.timer import NoopTimer
from torch import nn

from raptr_ds.data.batch import StepBatch
from raptr_ds.engine.deepspeed_engine import NEVER, pipeline_module
from raptr_ds.engine.tied_gradient import TiedGradient
from raptr_ds.engine.zero import ZeroEngine
from raptr_ds.model.stage import Stage
from raptr_ds.parallel.dropout import DropoutStreams
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.paths.path import LayerPath


class _StepBody(nn.Module):
    """Runs the stage on the step's micro batches, in order, for the engine in `owner`.

    Stages send each other only the residual stream: batches are pure functions of (seed, step, data-parallel rank),
    so that every stage has masks and sample ids itself.
    """

    owner: "PipelineEngine"

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    def begin(self, batch: StepBatch, path: LayerPath, weight: torch.Tensor, keys: torch.Tensor | None) -> None:
        """Begin a batch. weight: the factor of a micro batch's summed loss; keys: of dropout, None for none."""
        self.loss_weight, self.dropout_keys = weight, keys
        count = len(batch.micro_batches)
        self.waiting = iter((micro, path.of_micro_batch(n, count)) for n, micro in enumerate(batch.micro_batches))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        micro, path = next(self.waiting)
        streams = None if self.dropout_keys is None else DropoutStreams(self.dropout_keys, micro.sample_ids)
        with self.owner.clock.working():
            x = self.stage(x, micro, path, streams)
        if not self.stage.is_last:
            return x
        loss = x.sum() * self.loss_weight
        if loss.requires_grad:
            self.owner.observe(loss)
        return loss


class PipelineEngine(ZeroEngine):
    """Trains a model whose layers are divided among pipeline stages."""

    def __init__(
        self, config: dict[str, Any], stage: Stage, groups: ProcessGroups, seed: int, skipped_update: str
    ) -> None:
        self.body = _StepBody(stage)
        self.body.owner = self
        super().__init__(config, stage, groups, seed, skipped_update, pipeline_module(self.body, groups))
        # DeepSpeed would let each tensor rank send a part of what all have, and gather it. That waits for the device
        # twice a micro batch, to read the parts' sizes; with sequence parallelism ranks have own parts anyway.
        self.engine.is_pipe_partitioned = self.engine.is_grad_partitioned = False
        if self.engine.steps_per_print() == NEVER and not self.engine.wall_clock_breakdown():
            self.engine.timers = NoopTimer()  # DeepSpeed keeps two events of each batch until it prints their times
        if groups.embedding is not None and stage.embedding is not None and stage.model.tie_word_embeddings:
            self.engine.tied = TiedGradient(stage.embedding.word, groups, self.engine.get_data_types()[1])

    def _prepare(self, batch: StepBatch) -> None:
        if self.engine.tied is not None:
            self.engine.tied.begin(batch)

    def _run(self, batch: StepBatch, path: LayerPath, weight: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        self.body.begin(batch, path, weight, keys)
        return self.engine.train_batch(_inputs(batch))  # the average, on all stages

    def _losses(self, batch: StepBatch, path: LayerPath) -> Iterator[torch.Tensor]:
        self.body.begin(batch, path, torch.ones((), device=self.groups.device), None)
        num_micro_batches = len(batch.micro_batches)
        mean = self.engine.eval_batch(_inputs(batch), num_micro_batches=num_micro_batches)  # of one element
        if self.groups.data_rank == 0:  # all data-parallel ranks have the mean over all of them
            yield mean.double().sum() * (num_micro_batches * self.groups.topology.data)


def _inputs(batch: StepBatch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (inputs, labels) as DeepSpeed's first and last stage load them; labels are not used."""
    return ((micro.tokens, micro.tokens) for micro in batch.micro_batches)
