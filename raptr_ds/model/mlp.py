"""The block's feed-forward part, its inner features split over the tensor ranks."""

import torch
from torch import nn
from torch.nn import functional

from raptr_ds.model.spec import ModelSpec
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.parallel.layers import ColumnLinear, GatedColumnLinear, RowLinear


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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (b, T, H) to (b, T, H)."""
        if isinstance(self.expand, GatedColumnLinear):
            gate, value = self.expand(x)
            return self.contract(functional.silu(gate) * value)
        return self.contract(functional.gelu(self.expand(x)))
