"""A trained model run along any of its layers, without training: losses, early exits, logits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from raptr_ds.checkpoint.weights import TrainedModel
from raptr_ds.data.batch import MicroBatch
from raptr_ds.model.stage import Stage, build_stage
from raptr_ds.parallel.groups import lone_process_groups
from raptr_ds.paths.path import LayerPath


@dataclass(frozen=True)
class Network:
    """The model of one process."""

    stage: Stage
    device: torch.device

    @torch.inference_mode()
    def loss(self, batches: Iterable[MicroBatch], path: LayerPath) -> float:
        """Return the mean loss over all predicted positions along a path."""
        return _mean(([walk.loss(walk.run(walk.embedded, path))], walk.batch) for walk in self._walks(batches))[0]

    @torch.inference_mode()
    def losses_by_exit(self, batches: Iterable[MicroBatch], path: LayerPath) -> list[float]:
        """Return the mean loss after each layer of a path: the head on the stream there. One pass gives them all."""

        def losses(walk: _Walk) -> Iterator[torch.Tensor]:
            x = walk.embedded
            for layer in path.layers:
                x = walk.run(x, replace(path, layers=(layer,)))
                yield walk.loss(x)

        return _mean((losses(walk), walk.batch) for walk in self._walks(batches))

    @torch.inference_mode()
    def losses_without_each(self, batches: Iterable[MicroBatch], path: LayerPath) -> list[float]:
        """Return, for each layer of a path, the mean loss along the path without it.

        What lies before the layer is run once for all of them. The path's residual scale is that of what remains.
        """

        def losses(walk: _Walk) -> Iterator[torch.Tensor]:
            x = walk.embedded
            for place, layer in enumerate(path.layers):
                yield walk.loss(walk.run(x, replace(path, layers=path.layers[place + 1 :])))
                x = walk.run(x, replace(path, layers=(layer,)))

        return _mean((losses(walk), walk.batch) for walk in self._walks(batches))

    @torch.inference_mode()
    def logits(self, batch: MicroBatch, path: LayerPath) -> torch.Tensor:
        """Return the logits at the batch's positions, (N, vocabulary) on the CPU."""
        (walk,) = self._walks([batch])
        assert self.stage.head is not None
        x = walk.run(walk.embedded, path)
        return self.stage.head.logits(x, walk.batch.positions, walk.word_weight).cpu()

    def _walks(self, batches: Iterable[MicroBatch]) -> Iterator[_Walk]:
        for batch in batches:
            moved = batch.to(self.device)
            assert self.stage.embedding is not None
            positions = None if moved.segments is None else moved.segments.positions
            x, word_weight = self.stage.embedding(moved.tokens, None, positions)
            yield _Walk(self.stage, moved, x, word_weight, self.stage.attention_inputs(moved, x))


@dataclass(frozen=True)
class _Walk:
    """A micro batch on its way through the layers."""

    stage: Stage
    batch: MicroBatch
    embedded: torch.Tensor
    word_weight: torch.Tensor
    attention_inputs: tuple

    def run(self, x: torch.Tensor, path: LayerPath) -> torch.Tensor:
        return self.stage.layers(x, path, *self.attention_inputs, None)

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        assert self.stage.head is not None
        return self.stage.head(x, self.batch.positions, self.batch.targets, self.word_weight).double().sum()


def _mean(sums: Iterable[tuple[Iterable[torch.Tensor], MicroBatch]]) -> list[float]:
    """Return the sums over micro batches, divided by their predicted positions."""
    totals, count = torch.zeros(()), 0
    for losses, batch in sums:
        totals = totals + torch.stack(list(losses))
        count += batch.num_predictions
    return (totals / count).tolist()


@contextmanager
def open_network(trained: TrainedModel, device: str | None = None) -> Iterator[Network]:
    """Hold a trained model ready to run. device: by default a GPU if there is one."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with lone_process_groups() as groups:
        stage = build_stage(trained.model, groups, range(trained.model.num_layers), recompute=False, seed=0)
        stage.load_state_dict(trained.weights)
        yield Network(stage.to(place).eval(), place)
