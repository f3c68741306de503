"""One gradient norm, the same in every layout."""

from collections.abc import Iterable

import torch
import torch.distributed as dist


def global_norm(gradients: Iterable[torch.Tensor], device: torch.device, group: dist.ProcessGroup) -> torch.Tensor:
    """Return the L2 norm over this rank's gradients and those of the other ranks of `group`, an fp32 scalar.

    Each element of the model must be given on exactly one rank of the group (parallel/layers.py, is_owner). Norms of
    tensors are taken in fp32, their squares summed in fp64, so that the split hardly shows.
    """
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    total = torch.stack(norms).double().square().sum() if norms else torch.zeros((), dtype=torch.float64, device=device)
    if group.size() > 1:
        dist.all_reduce(total, group=group)
    return total.sqrt().float()


def clip_factor(norm: torch.Tensor, max_norm: float) -> torch.Tensor | float:
    """Return what gradients of this norm are multiplied by; max_norm 0 clips nothing."""
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0) if max_norm > 0 else 1.0
