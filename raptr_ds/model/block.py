"""One transformer layer, pre-norm: skipping it is the identity on the residual stream."""

import torch
from torch import nn

from raptr_ds.model.attention import Attention
from raptr_ds.model.key_ranges import KeyRanges
from raptr_ds.model.mlp import MLP
from raptr_ds.model.norm import build_norm
from raptr_ds.model.spec import ModelSpec
from raptr_ds.parallel.dropout import LayerDropout, dropout
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.parallel.sequence import sum_gradients


class Block(nn.Module):
    """Attention and feed-forward, each on the normalized stream, each added to it.

    A block does not know which layer it is, nor which path it is on: what differs comes as tensors, so that compiling
    one block compiles all.
    """

    def __init__(self, model: ModelSpec, groups: ProcessGroups, attention_kernel: bool = False) -> None:
        super().__init__()
        self.dropout_rate = model.hidden_dropout
        self.attention_norm = build_norm(model.normalization, model.hidden_size, model.norm_epsilon)
        self.attention = Attention(model, groups, attention_kernel)
        self.mlp_norm = build_norm(model.normalization, model.hidden_size, model.norm_epsilon)
        self.mlp = MLP(model, groups)
        self.sequence_rank = groups.sequence_rank
        for norm in (self.attention_norm, self.mlp_norm):
            sum_gradients(norm, groups)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | KeyRanges | None,
        rotary: torch.Tensor | None,
        masks: LayerDropout | None,
        residual_scale: torch.Tensor | None,
        heads: torch.Tensor | None = None,
        blocks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the stream after this layer, shape (b, T, H), or this rank's part of the sequences.

        Each branch is multiplied by residual_scale, a number in a tensor, or by nothing. masks: dropout's. heads and
        blocks: of this rank's attention heads and MLP blocks those that run, None for all.
        """
        attended = self.attention(self.attention_norm(x), mask, rotary, masks, heads)
        first = self.sequence_rank * x.shape[1]
        attended = dropout(attended, self.dropout_rate, masks, "attention_output", first_position=first)
        x = x + (attended if residual_scale is None else attended * residual_scale)
        processed = self.mlp(self.mlp_norm(x), blocks)
        processed = dropout(processed, self.dropout_rate, masks, "mlp_output", first_position=first)
        return x + (processed if residual_scale is None else processed * residual_scale)
