"""Multi-head self-attention, heads split over the tensor ranks, by torch's kernels or, on GPUs, our own."""

import torch
from torch import nn
from torch.nn import functional

from raptr_ds.config.sections import ModelSection
from raptr_ds.model.key_ranges import KeyRanges
from raptr_ds.parallel.cross_entropy import at_least_fp32
from raptr_ds.parallel.dropout import LayerDropout, attention_hashes, attention_keep_mask
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.parallel.layers import ColumnLinear, RowLinear, mark_parts, pieces

_SHORT = 128
"""Positions up to which attention on a CPU is computed in fp32 (see `_attend`)."""


class Attention(nn.Module):
    """Self-attention of this rank's heads; qkv rows are ordered (head, query|key|value, head dim), as Megatron's."""

    def __init__(self, model: ModelSection, groups: ProcessGroups, uses_kernel: bool = False) -> None:
        """uses_kernel: for masks and dropout the Triton kernel, in place of dense masks and spelled-out dropout."""
        super().__init__()
        hidden, bias = model.hidden_size, model.add_bias_linear
        self.head_dim = hidden // model.num_attention_heads
        self.num_local_heads = model.num_attention_heads // groups.topology.tensor
        self.first_head = groups.tensor_rank * self.num_local_heads
        self.dropout_rate = model.attention_dropout
        self.uses_kernel = uses_kernel
        self.qkv = ColumnLinear(hidden, 3 * hidden, bias, groups)
        self.output = RowLinear(hidden, hidden, bias, groups)
        for parameter, dim in ((self.qkv.weight, 0), (self.qkv.bias, 0), (self.output.weight, 1)):
            mark_parts(parameter, "heads", dim)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | KeyRanges | None,
        rotary: torch.Tensor | None,
        dropout: LayerDropout | None,
        active: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend; shapes: x (b, T, H), returns the same.

        mask: which keys are seen, None for all; for the kernel ranges, else what is added to the scores, broadcastable
        to (b, heads, T, T). active: (n,) int64, those of this rank's heads that run, counted from its first; None for
        all of them.
        """
        num_heads, rows, columns = self.num_local_heads, None, None
        if active is not None:
            num_heads, rows, columns = len(active), pieces(active, 3 * self.head_dim), pieces(active, self.head_dim)
        qkv = self.qkv.of_rows(x, rows)
        batch, length, _ = qkv.shape  # whole sequences, where x may be a part of them
        query, key, value = qkv.view(batch, length, num_heads, 3, self.head_dim).permute(3, 0, 2, 1, 4).unbind(0)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        if num_heads == 0:
            mixed = value  # nothing, but the other tensor ranks' gradients for x pass through
        elif dropout is None or self.dropout_rate == 0.0:
            mixed = _attend(query, key, value, mask)
        else:
            local = torch.arange(num_heads, device=x.device) if active is None else active
            mixed = self._attend_with_dropout(query, key, value, mask, dropout, self.first_head + local)
        mixed = mixed.transpose(1, 2).reshape(batch, length, num_heads * self.head_dim)
        return self.output.of_columns(mixed, columns)

    def _attend_with_dropout(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | KeyRanges | None,
        dropout: LayerDropout,
        heads: torch.Tensor,
    ) -> torch.Tensor:
        """Return what scaled_dot_product_attention would, whose kernels draw dropout that a layout changes.

        By our kernel, or spelled out. Then scores are the largest tensors of the model: what needs no copy of them for
        the backward pass is done in place, and the kept weights' factor 1 / (1 - rate) is left to the smaller result.
        heads: global indices of those that run here.
        """
        length, rate = query.shape[2], self.dropout_rate
        if self.uses_kernel:
            return _by_kernel(query, key, value, mask, attention_hashes(dropout, length, heads=heads), rate)
        scores = at_least_fp32(query @ key.transpose(-1, -2)).mul_(self.head_dim**-0.5)
        if mask is not None:
            assert isinstance(mask, torch.Tensor), "key ranges without the kernel"
            scores = scores.add_(mask)
        keep = attention_keep_mask(rate, dropout, length, heads=heads)
        weights = torch.where(keep, scores.softmax(-1), 0.0)
        return (weights.to(value.dtype) @ value) * (1.0 / (1.0 - rate))


def _by_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | KeyRanges | None,
    hashes: tuple[torch.Tensor, torch.Tensor] | None = None,
    rate: float = 0.0,
) -> torch.Tensor:
    from raptr_ds.model.fused_attention import fused_attention  # Triton is not there on every machine

    assert mask is None or isinstance(mask, KeyRanges), "a dense mask for the kernel"
    return fused_attention(query, key, value, mask, hashes, rate).transpose(1, 2)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | KeyRanges | None
) -> torch.Tensor:
    """Return attention without dropout: by our kernel for ranges, else by torch, in fp32 where that is faster.

    On a CPU the backward pass of torch's fused kernel (2.13.0, _scaled_dot_product_flash_attention_for_cpu_backward)
    takes two to three times as long in 16 bits as in fp32, whatever the CPU has for 16 bits. On long sequences its
    forward pass outweighs that.
    """
    if isinstance(mask, KeyRanges):
        return _by_kernel(query, key, value, mask)
    dtype = query.dtype
    if query.device.type != "cpu" or dtype.itemsize != 2 or query.shape[2] > _SHORT:
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    query, key, value = query.float(), key.float(), value.float()
    mask = None if mask is None else mask.float()
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).to(dtype)


def rotary_table(length: int, head_dim: int, base: float, device: torch.device) -> torch.Tensor:
    """Return cosines and sines, shape (2, length, head_dim / 2), fp32 (Su et al. 2021), in Llama's half-split form."""
    frequencies = 1.0 / base ** (torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotate x of shape (b, heads, T, head_dim) by its positions; computed in fp32 or more, returned in x's type.

    Shapes: table (2, T, head_dim / 2), or (2, b, 1, T, head_dim / 2) where each sequence has positions of its own.
    """
    cosine, sine = table
    first, second = x.chunk(2, dim=-1)  # the table's type, fp32, promotes what is less
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(x.dtype)
