"""Operations on lists of tensors, which on a GPU take a few kernels for all: what torch.optim and clip_grad use."""

from typing import Any

import torch

_torch: Any = torch  # these names have an underscore and are stable: torch.nn.utils.clip_grad, torch.optim


def norms(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the L2 norm of each tensor, taken in fp32; the list may be empty."""
    return list(_torch._foreach_norm(tensors, 2, torch.float32)) if tensors else []


def multiply_(tensors: list[torch.Tensor], factor: torch.Tensor | float) -> None:
    """Multiply each tensor in place by one number; the list may be empty, as on a stage that a path leaves out."""
    if tensors:
        _torch._foreach_mul_(tensors, factor)


def copy_(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy each source into its target, converting its type; the lists may be empty."""
    if targets:
        _torch._foreach_copy_(targets, sources)
