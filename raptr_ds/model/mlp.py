"""The block's feed-forward part, its inner features split over the tensor ranks."""

import torch
from torch import nn
from torch.nn import functional

from raptr_ds.model.spec import ModelSpec
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.parallel.layers import ColumnLinear, GatedColumnLinear, RowLinear, mark_parts, pieces


class MLP(nn.Module):
    """GELU or SwiGLU feed-forward; for SwiGLU, rows 2i and 2i + 1 of `expand` are gate and value of inner feature i.

    That order keeps gate and value together on whichever tensor rank holds feature i.
    """

    def __init__(self, model: ModelSpec, groups: ProcessGroups) -> None:
        super().__init__()
        hidden, inner, bias = model.hidden_size, model.ffn_hidden_size, model.add_bias_linear
        if model.activation == "swiglu":
            self.expand = GatedColumnLinear(hidden, 2 * inner, bias, groups)
        else:
            self.expand = ColumnLinear(hidden, inner, bias, groups)
        self.contract = RowLinear(inner, hidden, bias, groups)
        self.block_size = inner // model.num_attention_heads
        for parameter, dim in ((self.expand.weight, 0), (self.expand.bias, 0), (self.contract.weight, 1)):
            mark_parts(parameter, "blocks", dim)

    def forward(self, x: torch.Tensor, active: torch.Tensor | None = None) -> torch.Tensor:
        """Map (b, T, H) to (b, T, H).

        active: (n,) int64, those of this rank's blocks of inner features that run, counted from its first; a block is
        as many features as make one for each attention head of the model. None for all of them.
        """
        if isinstance(self.expand, GatedColumnLinear):
            rows = None if active is None else pieces(active, 2 * self.block_size)
            gate, value = self.expand(x) if rows is None else self.expand.of_rows(x, rows)
            inner = functional.silu(gate) * value
        else:
            rows = None if active is None else pieces(active, self.block_size)
            inner = functional.gelu(self.expand(x) if rows is None else self.expand.of_rows(x, rows))
        if active is None:
            return self.contract(inner)
        return self.contract.of_columns(inner, pieces(active, self.block_size))
