"""Multi-head self-attention on torch's scaled_dot_product_attention, heads split over the tensor ranks."""

import torch
from torch import nn
from torch.nn import functional

from raptr_ds.model.rotary import rotate
from raptr_ds.model.spec import ModelSpec
from raptr_ds.parallel.cross_entropy import at_least_fp32
from raptr_ds.parallel.dropout import LayerDropout, attention_keep_mask
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.parallel.layers import ColumnLinear, RowLinear, mark_parts, pieces

_SHORT = 128
"""Positions up to which attention on a CPU is computed in fp32 (see `_attend`)."""


class Attention(nn.Module):
    """Self-attention of this rank's heads; qkv rows are ordered (head, query|key|value, head dim), as Megatron's."""

    def __init__(self, model: ModelSpec, groups: ProcessGroups) -> None:
        super().__init__()
        hidden, bias = model.hidden_size, model.add_bias_linear
        self.head_dim = hidden // model.num_attention_heads
        self.num_local_heads = model.num_attention_heads // groups.topology.tensor
        self.first_head = groups.tensor_rank * self.num_local_heads
        self.dropout_rate = model.attention_dropout
        self.qkv = ColumnLinear(hidden, 3 * hidden, bias, groups)
        self.output = RowLinear(hidden, hidden, bias, groups)
        for parameter, dim in ((self.qkv.weight, 0), (self.qkv.bias, 0), (self.output.weight, 1)):
            mark_parts(parameter, "heads", dim)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        rotary: torch.Tensor | None,
        dropout: LayerDropout | None,
        active: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend; shapes: x (b, T, H); mask, added to the scores, broadcastable to (b, heads, T, T), None for none.

        active: (n,) int64, those of this rank's heads that run, counted from its first; None for all of them.
        """
        num_heads = self.num_local_heads if active is None else len(active)
        qkv = self.qkv(x) if active is None else self.qkv.of_rows(x, pieces(active, 3 * self.head_dim))
        batch, length, _ = qkv.shape  # whole sequences, where x may be a part of them
        qkv = qkv.view(batch, length, num_heads, 3, self.head_dim)
        query, key, value = qkv.permute(3, 0, 2, 1, 4).unbind(0)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        if num_heads == 0:
            mixed = value  # nothing, but the other tensor ranks' gradients for x pass through
        elif dropout is None or self.dropout_rate == 0.0:
            mixed = _attend(query, key, value, mask)
        else:
            mixed = self._attend_with_dropout(query, key, value, mask, dropout, active)
        mixed = mixed.transpose(1, 2).reshape(batch, length, num_heads * self.head_dim)
        return self.output(mixed) if active is None else self.output.of_columns(mixed, pieces(active, self.head_dim))

    def _attend_with_dropout(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        dropout: LayerDropout,
        active: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return what scaled_dot_product_attention would, spelled out: its kernels draw dropout that a layout changes.

        Scores are the largest tensors of the model: what needs no copy of them for the backward pass is done in place,
        and the kept weights' factor 1 / (1 - rate) is left to the smaller result.
        """
        scores = at_least_fp32(query @ key.transpose(-1, -2)).mul_(self.head_dim**-0.5)
        if mask is not None:
            scores = scores.add_(mask)
        if active is None:
            active = torch.arange(self.num_local_heads, device=query.device)
        keep = attention_keep_mask(self.dropout_rate, dropout, query.shape[2], heads=self.first_head + active)
        weights = torch.where(keep, scores.softmax(-1), 0.0)
        return (weights.to(value.dtype) @ value) * (1.0 / (1.0 - self.dropout_rate))


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return scaled_dot_product_attention's result, computed in fp32 where that is faster.

    On a CPU the backward pass of torch's fused kernel (2.13.0, _scaled_dot_product_flash_attention_for_cpu_backward)
    takes two to three times as long in 16 bits as in fp32, whatever the CPU has for 16 bits. On long sequences its
    forward pass makes up for that.
    """
    dtype = query.dtype
    if query.device.type != "cpu" or dtype.itemsize != 2 or query.shape[2] > _SHORT:
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    query, key, value = query.float(), key.float(), value.float()
    mask = None if mask is None else mask.float()
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).to(dtype)
