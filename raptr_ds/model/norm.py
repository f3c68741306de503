"""Normalization of the residual stream."""

from torch import nn


def build_norm(kind: str, hidden_size: int, epsilon: float) -> nn.Module:
    """Return a `layernorm` or an `rmsnorm` over the last dim of (..., hidden_size)."""
    if kind == "rmsnorm":
        return nn.RMSNorm(hidden_size, eps=epsilon)
    return nn.LayerNorm(hidden_size, eps=epsilon)
