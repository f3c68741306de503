"""Rotary position embedding (Su et al. 2021), in the half-split form of Llama and GPT-NeoX."""

import torch


def rotary_table(length: int, head_dim: int, base: float, device: torch.device) -> torch.Tensor:
    """Return cosines and sines, shape (2, length, head_dim / 2), fp32."""
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
