"""One gradient norm, the same in every layout."""

import torch
import torch.distributed as dist

from raptr_ds.engine import foreach


def global_norm(
    gradients: list[torch.Tensor], losses: "LossCheck", device: torch.device, group: dist.ProcessGroup
) -> torch.Tensor:
    """Return the L2 norm over this rank's gradients and those of the other ranks of `group`, an fp32 scalar.

    Each element of the model must be given on exactly one rank of the group (parallel/layers.py, is_owner). Norms of
    tensors are taken in fp32, their squares summed in fp64, so that the split hardly shows. What `losses` has seen is
    taken out of it; the norm is not finite where a loss was not.
    """
    norms = [*foreach.norms(gradients), *(loss.abs().float() for loss in losses.take())]
    total = torch.stack(norms).double().square().sum() if norms else torch.zeros((), dtype=torch.float64, device=device)
    if group.size() > 1:
        dist.all_reduce(total, group=group)
    return total.sqrt().float()


class LossCheck:
    """Lets a loss that is not finite spoil the gradient norm, so that it is noticed without a collective of its own.

    A loss can be infinite while its gradients are finite: an fp16 logit that overflows. The step must be skipped then,
    on all ranks, also where one rank alone saw it.
    """

    def __init__(self) -> None:
        self._seen: torch.Tensor | None = None

    def observe(self, loss: torch.Tensor) -> None:
        """Take a micro batch's loss, a scalar."""
        spoiled = loss.detach() * 0.0  # 0 or NaN
        self._seen = spoiled if self._seen is None else self._seen + spoiled

    def take(self) -> list[torch.Tensor]:
        """Return what is to be counted in the norm, 0 or NaN, and forget it; empty on a rank without losses."""
        seen, self._seen = self._seen, None
        return [] if seen is None else [seen]


def clip_factor(norm: torch.Tensor, max_norm: float) -> torch.Tensor | float:
    """Return what gradients of this norm are multiplied by; max_norm 0 clips nothing."""
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0) if max_norm > 0 else 1.0
