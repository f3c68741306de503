"""One transformer layer, pre-norm: skipping it is the identity on the residual stream."""

import torch
from torch import nn

from raptr_ds.model.attention import Attention
from raptr_ds.model.mlp import MLP
from raptr_ds.model.norm import build_norm
from raptr_ds.model.spec import ModelSpec
from raptr_ds.parallel.dropout import DropoutStreams, dropout
from raptr_ds.parallel.groups import ProcessGroups


class Block(nn.Module):
    """Attention and feed-forward, each on the normalized stream, each added to it."""

    def __init__(self, model: ModelSpec, groups: ProcessGroups, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.dropout_rate = model.hidden_dropout
        self.attention_norm = build_norm(model.normalization, model.hidden_size, model.norm_epsilon)
        self.attention = Attention(model, groups, layer)
        self.mlp_norm = build_norm(model.normalization, model.hidden_size, model.norm_epsilon)
        self.mlp = MLP(model, groups)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        rotary: torch.Tensor | None,
        streams: DropoutStreams | None,
        residual_scale: float,
    ) -> torch.Tensor:
        """Return the stream after this layer, shape (b, T, H); each branch is multiplied by residual_scale."""
        attended = self.attention(self.attention_norm(x), mask, rotary, streams)
        attended = dropout(attended, self.dropout_rate, streams, self.layer, "attention_output")
        x = x + (attended if residual_scale == 1.0 else attended * residual_scale)
        processed = dropout(self.mlp(self.mlp_norm(x)), self.dropout_rate, streams, self.layer, "mlp_output")
        return x + (processed if residual_scale == 1.0 else processed * residual_scale)
