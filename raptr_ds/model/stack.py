"""The layers that a rank holds, and the one place where a layer is skipped."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from raptr_ds.config.sections import ModelSection
from raptr_ds.model.block import Block
from raptr_ds.model.key_ranges import KeyRanges
from raptr_ds.parallel.dropout import DropoutStreams
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.parallel.transfer import without_waiting
from raptr_ds.paths.path import LayerPath


class Stack(nn.ModuleDict):
    """Blocks keyed by their global layer index, so that a parameter has the same name in every layout."""

    keep_activations_up_to: int
    """Most layers here along which a training step keeps their activations; along more it computes them again."""

    def __init__(
        self, model: ModelSection, groups: ProcessGroups, layers: Iterable[int], attention_kernel: bool = False
    ) -> None:
        super().__init__({str(layer): Block(model, groups, attention_kernel) for layer in layers})
        self.keep_activations_up_to = len(self)
        self.num_local_parts = model.num_attention_heads // groups.topology.tensor
        self.first_part = groups.tensor_rank * self.num_local_parts
        self.has_dropout = model.hidden_dropout > 0 or model.attention_dropout > 0

    def forward(
        self,
        x: torch.Tensor,
        path: LayerPath,
        mask: torch.Tensor | KeyRanges | None,
        rotary: torch.Tensor | None,
        streams: DropoutStreams | None,
    ) -> torch.Tensor:
        """Run the layers of the path that are here, in order; the others do no work. Shapes: x (b, T, H)."""
        active = path.active_in(map(int, self))
        recompute = self.recomputes(len(active)) and torch.is_grad_enabled()
        for layer in active:
            block = self[str(layer)]
            masks = streams.of_layer(layer) if streams is not None and self.has_dropout else None
            arguments = (mask, rotary, masks, _scale_of(path, layer), *self._local_parts(path, layer, x.device))
            if recompute:
                # Path and dropout are arguments, never drawn inside: the recomputation sees the same ones.
                x = checkpoint(block, x, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, *arguments)
        return x

    def recomputes(self, num_active: int) -> bool:
        """Return whether training along so many of the layers here recomputes their activations."""
        return num_active > self.keep_activations_up_to

    def _local_parts(self, path: LayerPath, layer: int, device: torch.device) -> list[torch.Tensor | None]:
        """Return which of this rank's heads and MLP blocks run in a layer, counted from its first; None for all."""
        if path.parts is None:
            return [None, None]
        here = range(self.first_part, self.first_part + self.num_local_parts)
        return [
            without_waiting(torch.tensor([p - self.first_part for p in parts[layer] if p in here]).long(), device)
            for parts in (path.parts.heads, path.parts.blocks)
        ]


def _scale_of(path: LayerPath, layer: int) -> torch.Tensor | None:
    """Return the factor on a layer's branches, None for 1.

    It lies on the CPU, so that no graph contains its value and no device waits for it; fp64 leaves x's type alone.
    """
    scale = path.scale_of(layer)
    return None if scale == 1.0 else torch.tensor(scale, dtype=torch.float64)
