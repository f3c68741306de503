"""The global gradient norm, the same in every layout, and clipping by it."""

import torch
import torch.distributed as dist

from raptr_ds.parallel.groups import ProcessGroups

_ROW = 1024  # elements


def global_norm(gradients: list[torch.Tensor], losses: "LossCheck", groups: ProcessGroups) -> torch.Tensor:
    """Return the L2 norm over the gradients of all ranks, an fp32 scalar.

    Each element of the model must be passed on exactly one rank (parallel/layers.py, is_owner). Norms of tensors are
    taken in fp32 and their squares summed in fp64, so that the layout hardly shows. The norm is not finite if one of
    the losses in `losses`, which are consumed, is not.
    """
    norms = [*_norms(gradients), *(loss.abs().float().view(1) for loss in losses.take())]
    total = torch.zeros((), dtype=torch.float64, device=groups.device)
    if norms:
        total = torch.cat(norms).double().square().sum()
    if groups.topology.world_size > 1:
        dist.all_reduce(total, group=groups.world)
    return total.sqrt().float()


def _norms(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return L2 norms, (n,) each, taken in fp32, whose squares add up to that of all elements.

    torch's norm on a CPU adds up squares in a few fp32 sums as long as the tensor (2.13: off by 2e-4 at 8 million
    elements; tests/upstream): there it is taken of rows.
    """
    if not tensors or tensors[0].device.type != "cpu":
        return _norms_at_once(tensors)
    norms = []
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        rows = flat[: flat.numel() // _ROW * _ROW].view(-1, _ROW)
        norms.append(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32))
        norms.append(torch.linalg.vector_norm(flat[rows.numel() :], dtype=torch.float32).view(1))
    return norms


def _norms_at_once(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the norm of each tensor, all in one, with a few kernels for all of them."""
    if not tensors:
        return []
    return [torch.stack(torch._foreach_norm(tensors, 2, torch.float32))]  # type: ignore[reportPrivateImportUsage]


class LossCheck:
    """Makes the gradient norm NaN if a loss was not finite, so that all ranks learn of it without another collective.

    A loss can be infinite while its gradients are finite, for example if an fp16 logit overflows. All ranks must skip
    that step, even if only one of them saw the loss.
    """

    def __init__(self) -> None:
        self._seen: torch.Tensor | None = None

    def observe(self, loss: torch.Tensor) -> None:
        """Record a micro batch's loss, a scalar."""
        spoiled = loss.detach() * 0.0  # 0 or NaN
        self._seen = spoiled if self._seen is None else self._seen + spoiled

    def take(self) -> list[torch.Tensor]:
        """Return [0] or [NaN], to be counted in the norm, and forget it; [] on a rank that has seen no loss."""
        seen, self._seen = self._seen, None
        return [] if seen is None else [seen]


def clip_factor(norm: torch.Tensor, max_norm: float) -> torch.Tensor | float:
    """Return the factor that clips gradients of this norm to max_norm; 1 if max_norm is 0."""
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0) if max_norm > 0 else 1.0
