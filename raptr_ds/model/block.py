"""One transformer layer, pre-norm: skipping it is the identity on the residual stream."""

import torch
from torch import nn
from torch.nn import functional

from raptr_ds.config.sections import ModelSection
from raptr_ds.model.attention import Attention
from raptr_ds.model.key_ranges import KeyRanges
from raptr_ds.parallel.dropout import LayerDropout, dropout
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.parallel.layers import ColumnLinear, GatedColumnLinear, RowLinear, mark_parts, pieces
from raptr_ds.parallel.sequence import sum_gradients


def build_norm(model: ModelSection) -> nn.Module:
    """Return the model's norm, over the last dim of (..., hidden_size)."""
    kind = nn.RMSNorm if model.normalization == "rmsnorm" else nn.LayerNorm
    return kind(model.hidden_size, eps=model.norm_epsilon)


class MLP(nn.Module):
    """GELU or SwiGLU feed-forward; for SwiGLU `expand` has two rows for each inner feature (GatedColumnLinear)."""

    def __init__(self, model: ModelSection, groups: ProcessGroups) -> None:
        super().__init__()
        hidden, inner, bias = model.hidden_size, model.ffn_hidden_size, model.add_bias_linear
        self.rows_per_feature = 2 if model.activation == "swiglu" else 1
        expand = GatedColumnLinear if model.activation == "swiglu" else ColumnLinear
        self.expand = expand(hidden, self.rows_per_feature * inner, bias, groups)
        self.contract = RowLinear(inner, hidden, bias, groups)
        self.block_size = inner // model.num_attention_heads
        for parameter, dim in ((self.expand.weight, 0), (self.expand.bias, 0), (self.contract.weight, 1)):
            mark_parts(parameter, "blocks", dim)

    def forward(self, x: torch.Tensor, active: torch.Tensor | None = None) -> torch.Tensor:
        """Map (b, T, H) to (b, T, H).

        active: (n,) int64, those of this rank's blocks of inner features that run, counted from its first; a block is
        as many features as make one for each attention head of the model. None for all of them.
        """
        rows = columns = None
        if active is not None:
            rows, columns = pieces(active, self.rows_per_feature * self.block_size), pieces(active, self.block_size)
        inner = self.expand.of_rows(x, rows)
        inner = functional.gelu(inner) if self.rows_per_feature == 1 else functional.silu(inner[0]) * inner[1]
        return self.contract.of_columns(inner, columns)


class Block(nn.Module):
    """Attention and feed-forward, each on the normalized stream, each added to it.

    A block does not know which layer it is, nor which path it is on: what differs comes as tensors, so that compiling
    one block compiles all.
    """

    def __init__(self, model: ModelSection, groups: ProcessGroups, attention_kernel: bool = False) -> None:
        super().__init__()
        self.dropout_rate = model.hidden_dropout
        self.attention_norm = build_norm(model)
        self.attention = Attention(model, groups, attention_kernel)
        self.mlp_norm = build_norm(model)
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
        attended = dropout(attended, self.dropout_rate, masks, "attention_output", first)
        x = x + (attended if residual_scale is None else attended * residual_scale)
        processed = self.mlp(self.mlp_norm(x), blocks)
        processed = dropout(processed, self.dropout_rate, masks, "mlp_output", first)
        return x + (processed if residual_scale is None else processed * residual_scale)
