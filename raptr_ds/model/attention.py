"""Multi-head self-attention on torch's scaled_dot_product_attention, heads split over the tensor ranks."""

import math

import torch
from torch import nn
from torch.nn import functional

from raptr_ds.config.sections import ModelSection
from raptr_ds.model.rotary import rotate
from raptr_ds.parallel.dropout import DropoutStreams, attention_dropout
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.parallel.layers import ColumnLinear, RowLinear


class Attention(nn.Module):
    """Self-attention of this rank's heads; qkv rows are ordered (head, query|key|value, head dim), as Megatron's."""

    def __init__(self, model: ModelSection, groups: ProcessGroups, layer: int) -> None:
        super().__init__()
        hidden, bias = model.hidden_size, model.add_bias_linear
        self.layer = layer
        self.head_dim = hidden // model.num_attention_heads
        self.num_local_heads = model.num_attention_heads // groups.topology.tensor
        self.first_head = groups.tensor_rank * self.num_local_heads
        self.dropout_rate = model.attention_dropout
        self.qkv = ColumnLinear(hidden, 3 * hidden, bias, groups)
        self.output = RowLinear(hidden, hidden, bias, groups)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        rotary: torch.Tensor | None,
        streams: DropoutStreams | None,
    ) -> torch.Tensor:
        """Attend; shapes: x (b, T, H); mask bool, broadcastable to (b, heads, T, T), True where seen, None for all."""
        batch, length, _ = x.shape
        qkv = self.qkv(x).view(batch, length, self.num_local_heads, 3, self.head_dim)
        query, key, value = qkv.permute(3, 0, 2, 1, 4).unbind(0)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        if streams is None or self.dropout_rate == 0.0:
            mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        else:
            # The fused kernels draw their own dropout, which a layout would change: spell it out.
            scores = (query @ key.transpose(-1, -2)).float() / math.sqrt(self.head_dim)
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf)
            weights = attention_dropout(scores.softmax(-1), self.dropout_rate, streams, self.layer, self.first_head)
            mixed = weights.to(value.dtype) @ value
        return self.output(mixed.transpose(1, 2).reshape(batch, length, -1))
