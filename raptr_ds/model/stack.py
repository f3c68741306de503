"""The layers that a rank holds, and the one place where a layer is skipped."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from raptr_ds.model.block import Block
from raptr_ds.model.spec import ModelSpec
from raptr_ds.parallel.dropout import DropoutStreams
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.paths.path import Path


class Stack(nn.ModuleDict):
    """Blocks keyed by their global layer index, so that a parameter has the same name in every layout."""

    def __init__(self, model: ModelSpec, groups: ProcessGroups, layers: Iterable[int], recompute: bool) -> None:
        super().__init__({str(layer): Block(model, groups, layer) for layer in layers})
        self.recompute = recompute

    def forward(
        self,
        x: torch.Tensor,
        path: Path,
        mask: torch.Tensor | None,
        rotary: torch.Tensor | None,
        streams: DropoutStreams | None,
    ) -> torch.Tensor:
        """Run the layers of the path that are here, in order; the others do no work. Shapes: x (b, T, H)."""
        for name, block in self.items():
            if not path.is_active(int(name)):
                continue
            if self.recompute and torch.is_grad_enabled():
                # Path and dropout are arguments, never drawn inside: the recomputation sees the same ones.
                x = checkpoint(
                    block,
                    x,
                    mask,
                    rotary,
                    streams,
                    path.residual_scale,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                x = block(x, mask, rotary, streams, path.residual_scale)
        return x
