"""The block's feed-forward part, its inner features split over the tensor ranks."""

import torch
from torch import nn
from torch.nn import functional

from raptr_ds.config.sections import ModelSection
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.parallel.layers import ColumnLinear, RowLinear


class MLP(nn.Module):
    """GELU or SwiGLU feed-forward; for SwiGLU, rows 2i and 2i + 1 of `expand` are gate and value of inner feature i.

    That order keeps gate and value together on whichever tensor rank holds feature i.
    """

    def __init__(self, model: ModelSection, groups: ProcessGroups) -> None:
        super().__init__()
        self.gated = model.activation == "swiglu"
        inner = model.ffn_hidden_size * (2 if self.gated else 1)
        self.expand = ColumnLinear(model.hidden_size, inner, model.add_bias_linear, groups)
        self.contract = RowLinear(model.ffn_hidden_size, model.hidden_size, model.add_bias_linear, groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (b, T, H) to (b, T, H)."""
        inner = self.expand(x)
        if self.gated:
            gate, value = inner.unflatten(-1, (-1, 2)).unbind(-1)
            return self.contract(functional.silu(gate) * value)
        return self.contract(functional.gelu(inner))
