"""ZeRO stage 0: every data-parallel rank holds the whole optimizer state, in fp32 beside the working weights.

DeepSpeed's own stage 0 creates and reduces zero gradients for skipped layers (runtime/engine.py,
_get_gradients_for_reduction) and clips by another norm than its ZeRO stages (runtime/utils.py, clip_grad_norm_).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from raptr_ds.engine.gradient_norm import LossCheck, clip_factor, global_norm
from raptr_ds.engine.idle_parts import idle_parts_kept
from raptr_ds.engine.parameter_groups import moving_layers
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.parallel.layers import is_owner
from raptr_ds.paths.path import Path

_BUCKET_ELEMENTS = 1 << 26


class ReplicatedOptimizer:
    """Reduces, unscales, clips and applies gradients; steps the inner torch optimizer on fp32 weights.

    It has the attributes that DeepSpeed's engine asks of an optimizer: step, zero_grad, overflow, _global_grad_norm,
    param_groups, loss_scale.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        groups: ProcessGroups,
        max_norm: float,
        loss_scaler: Any,
        accumulate_in_fp32: bool,
    ) -> None:
        self.inner, self.groups, self.max_norm, self.loss_scaler = inner, groups, max_norm, loss_scaler
        self.moves: Callable[[int], bool] = lambda _layer: True
        self.freezes_parts = True  # whether heads and MLP blocks that have not run stay as they are
        self.path: Path | None = None
        self.loss_check = LossCheck()
        self.overflow = False
        self._global_grad_norm: torch.Tensor | float = 0.0
        self.pairs: list[tuple[nn.Parameter, torch.Tensor, int]] = []
        for group in inner.param_groups:
            working = group["params"]
            group["params"] = [self._master(parameter) for parameter in working]
            self.pairs += [(w, m, group["layer"]) for w, m in zip(working, group["params"], strict=True)]
        if accumulate_in_fp32:
            for parameter, _, _ in self.pairs:
                parameter.register_post_accumulate_grad_hook(_move_gradient_to_fp32)

    @staticmethod
    def _master(parameter: nn.Parameter) -> torch.Tensor:
        if parameter.dtype == torch.float32:
            return parameter
        return parameter.detach().float().clone().requires_grad_()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's groups."""
        return self.inner.param_groups

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by before the backward pass."""
        return self.loss_scaler.loss_scale

    def follow(self, path: Path, freezes: bool) -> None:
        """Train the next step along `path`; under `freeze` only its layers move, under `zero_grad` all."""
        self.moves = moving_layers(path, freezes)
        self.path = path

    def follow_micro_batch(self, path: Path) -> None:
        """Train the next micro batch along `path`: nothing to prepare."""

    def follow_forward(self, path: Path) -> None:
        """Run forward passes along `path`: nothing to prepare."""

    def reduce_gradients(self) -> None:
        """Average the gradients over the data-parallel ranks; skipped layers have none and send nothing."""
        if self.groups.topology.data == 1:
            return
        bucket: list[torch.Tensor] = []
        for parameter, _, _ in self.pairs:
            gradient = gradient_of(parameter)
            if gradient is None:
                continue
            bucket.append(gradient)
            if sum(g.numel() for g in bucket) >= _BUCKET_ELEMENTS:
                self._reduce(bucket)
                bucket = []
        self._reduce(bucket)

    def _reduce(self, bucket: list[torch.Tensor]) -> None:
        if not bucket:
            return
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat, group=self.groups.data)
        flat /= self.groups.topology.data
        for gradient, mean in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def step(self) -> None:
        """Apply the reduced gradients, or skip the step on all ranks alike if their norm or a loss is not finite."""
        scale = self.loss_scale
        gradients = [(w, m, gradient_of(w)) for w, m, layer in self.pairs if self.moves(layer)]
        # All ranks of the data axis hold the same gradients: the first counts them, the others only see their losses.
        is_counted = self.groups.data_rank == 0
        owned = [g for w, _, g in gradients if is_counted and g is not None and is_owner(w, self.groups)]
        norm = global_norm([*owned, *self.loss_check.take()], self.groups.device, self.groups.world) / scale
        self.overflow = not bool(torch.isfinite(norm))
        self._global_grad_norm = norm
        self.loss_scaler.update_scale(self.overflow)
        if self.overflow:
            return
        factor = clip_factor(norm, self.max_norm) / scale
        for _, master, gradient in gradients:
            # In place where the gradient has the master's type already: nobody else reads it after this.
            master.grad = torch.zeros_like(master) if gradient is None else gradient.to(master.dtype).mul_(factor)
        every = self.inner.param_groups
        self.inner.param_groups = [group for group in every if self.moves(group["layer"])]
        try:
            with self._idle_parts_kept():
                self.inner.step()
        finally:
            self.inner.param_groups = every
        self.refresh(self.moves)

    def _idle_parts_kept(self) -> AbstractContextManager[None]:
        if self.path is None or self.path.parts is None or not self.freezes_parts:
            return nullcontext()
        moving = [pair for pair in self.pairs if self.moves(pair[2])]
        tensor_size = self.groups.topology.tensor
        return idle_parts_kept(self.inner, moving, self.path, self.groups.tensor_rank, tensor_size)

    @torch.no_grad()
    def refresh(self, is_wanted: Callable[[int], bool]) -> None:
        """Let the working weights of the wanted layers follow from the fp32 ones, where those are others."""
        for working, master, layer in self.pairs:
            if working is not master and is_wanted(layer):
                working.copy_(master)

    def gather(self, is_wanted: Callable[[int], bool]) -> None:
        """Do nothing: every rank has all weights."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        for working, master, _ in self.pairs:
            working.grad = master.grad = None
            working.fp32_grad = None  # type: ignore[attr-defined]


def gradient_of(parameter: nn.Parameter) -> torch.Tensor | None:
    """Return the accumulated gradient, wherever it accumulates; None for a layer that was skipped."""
    gradient = getattr(parameter, "fp32_grad", None)
    return parameter.grad if gradient is None else gradient


def _move_gradient_to_fp32(parameter: torch.Tensor) -> None:
    assert parameter.grad is not None
    gathered = getattr(parameter, "fp32_grad", None)
    if gathered is None:
        parameter.fp32_grad = parameter.grad.float()  # type: ignore[attr-defined]
    else:
        gathered.add_(parameter.grad)
    parameter.grad = None
