"""ZeRO stage 0: every data-parallel rank has all fp32 weights and optimizer states, beside the working weights.

DeepSpeed's own stage 0 creates and reduces zero gradients for skipped layers (runtime/engine.py,
_get_gradients_for_reduction) and clips by another norm than its ZeRO stages (runtime/utils.py, clip_grad_norm_).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from raptr_ds.engine.fragments import Holder
from raptr_ds.engine.gradient_norm import LossCheck, clip_factor, global_norm
from raptr_ds.engine.idle_parts import idle_parts_kept
from raptr_ds.engine.parameter_groups import every_layer, layers_on
from raptr_ds.engine.work_clock import WorkClock
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.parallel.layers import is_owner
from raptr_ds.paths.path import LayerPath, Parts

_BUCKET_ELEMENTS = 1 << 26


class ReplicatedOptimizer:
    """Reduces, unscales and clips gradients, and steps the inner torch optimizer on fp32 weights with them.

    It has the attributes that DeepSpeed's engine needs of an optimizer: step, zero_grad, overflow, _global_grad_norm,
    param_groups, loss_scale.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        groups: ProcessGroups,
        max_norm: float,
        loss_scaler: Any,
        accumulate_in_fp32: bool,
        clock: WorkClock,
    ) -> None:
        self.inner, self.groups, self.max_norm, self.loss_scaler = inner, groups, max_norm, loss_scaler
        self.clock = clock
        self.moves: Callable[[int], bool] = every_layer
        self.kept_parts: Parts | None = None
        self.loss_check = LossCheck()
        self.overflow, self._is_unfinished = False, False
        self.decides_on_device = _skips_on_device(inner, groups.device)
        self._global_grad_norm: torch.Tensor | float = 0.0
        self.pairs: list[tuple[nn.Parameter, torch.Tensor, int]] = []
        self._layer_groups = inner.param_groups
        for group in self._layer_groups:
            working = group["params"]
            group["params"] = [self._master(parameter) for parameter in working]
            self.pairs += [(w, m, group["layer"]) for w, m in zip(working, group["params"], strict=True)]
        # torch counts steps by parameter and passes over those without a gradient, so one call can step layers whose
        # counts differ. DeepSpeed's fused optimizers count by group (ops/adam/fused_adam.py).
        if type(inner).__module__.startswith("torch."):
            inner.param_groups = _merged(self._layer_groups)
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
        """The factor of the loss in the backward pass."""
        return self.loss_scaler.loss_scale

    def follow(self, path: LayerPath, freezes: bool) -> None:
        """Prepare for a training step along `path`, which changes only its layers if `freezes`, else all."""
        self.kept_parts = path.parts if freezes else None
        self.moves = layers_on(path) if freezes else every_layer

    def follow_micro_batch(self, path: LayerPath) -> None:
        """Do nothing: no weight has to be fetched."""

    def follow_forward(self, path: LayerPath) -> None:
        """Do nothing: no weight has to be fetched."""

    def reduce_gradients(self) -> None:
        """Average the gradients over the data-parallel ranks; skipped layers have none, so nothing is sent for them."""
        if self.groups.topology.data == 1:
            return
        found = [gradient for working, _, _ in self.pairs if (gradient := gradient_of(working)) is not None]
        bucket: list[torch.Tensor] = []
        elements = 0
        with self.clock.waiting():
            for gradient in found:
                bucket.append(gradient)
                elements += gradient.numel()
                if elements >= _BUCKET_ELEMENTS or gradient is found[-1]:
                    self._reduce(bucket)
                    bucket, elements = [], 0

    def _reduce(self, bucket: list[torch.Tensor]) -> None:
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat, group=self.groups.data)
        flat /= self.groups.topology.data
        means = flat.split([gradient.numel() for gradient in bucket])
        _copy(bucket, [mean.view_as(g) for mean, g in zip(means, bucket, strict=True)])

    def step(self) -> None:
        """Apply the reduced gradients, or skip the step on every rank if their norm or a loss is not finite.

        If `decides_on_device`, `overflow` is valid only after `finish_step`.
        """
        scale = self.loss_scale
        moving = [pair for pair in self.pairs if self.moves(pair[2])]
        gradients = [(w, m, gradient_of(w)) for w, m, _ in moving]
        # All data-parallel ranks have the same gradients: the first counts them, the others only their losses.
        is_counted = self.groups.data_rank == 0
        owned = [g for w, _, g in gradients if is_counted and g is not None and is_owner(w, self.groups)]
        with self.clock.waiting():
            norm = global_norm(owned, self.loss_check, self.groups) / scale
        self._global_grad_norm = norm
        self.overflow, self._is_unfinished = False, True
        if not self.decides_on_device:
            self.finish_step(norm.item())
            if self.overflow:
                return
        accumulated = self._hand_over(gradients)
        factor = clip_factor(norm, self.max_norm) / scale
        with idle_parts_kept(self.inner, moving, self.kept_parts, self.groups):
            if self.decides_on_device:
                self._step_if_finite(norm, factor)
            else:
                if accumulated and (isinstance(factor, torch.Tensor) or factor != 1.0):
                    torch._foreach_mul_(accumulated, factor)  # type: ignore[reportPrivateImportUsage]
                self.inner.step()
        self.refresh(self.moves)

    def finish_step(self, norm: float) -> None:
        """Set `overflow` and update the loss scale, once the host has the step's norm."""
        if self._is_unfinished:
            self._is_unfinished = False
            self.overflow = not math.isfinite(norm)
            self.loss_scaler.update_scale(self.overflow)

    @staticmethod
    def _hand_over(gradients: list[tuple[nn.Parameter, torch.Tensor, torch.Tensor | None]]) -> list[torch.Tensor]:
        """Set the fp32 weights' gradients, in fp32, and return these; zeros for a layer that was skipped.

        Gradients that are fp32 already are not copied: they may be scaled in place, nobody reads them after the step.
        """
        given, wide, narrow = [], [], []
        for _, master, gradient in gradients:
            if gradient is None:
                given.append(torch.zeros_like(master))
            elif gradient.dtype == master.dtype:
                given.append(gradient)
            else:
                given.append(torch.empty_like(master))
                wide.append(given[-1])
                narrow.append(gradient)
            master.grad = given[-1]
        _copy(wide, narrow)
        return given

    def _step_if_finite(self, norm: torch.Tensor, factor: torch.Tensor | float) -> None:
        """Step in the optimizer's kernel, which divides gradients by grad_scale and changes nothing if found_inf is 1.

        torch/optim/adam.py, _fused_adam, as torch.amp.GradScaler uses it: step counts are restored as well.
        """
        inner: Any = self.inner
        inner.found_inf = torch.isfinite(norm).logical_not_().float()
        inner.grad_scale = 1.0 / factor if isinstance(factor, torch.Tensor) else torch.full_like(norm, 1.0 / factor)
        try:
            inner.step()
        finally:
            del inner.found_inf, inner.grad_scale

    @torch.no_grad()
    def refresh(self, is_wanted: Callable[[int], bool]) -> None:
        """Copy the fp32 weights of the wanted layers to the working weights, unless they are the same tensors."""
        behind = [(w, m) for w, m, layer in self.pairs if w is not m and is_wanted(layer)]
        _copy([working for working, _ in behind], [master for _, master in behind])

    def holders(self, names: Mapping[nn.Parameter, str]) -> list[Holder]:
        """Return where weights and states lie: each parameter has its own fp32 tensor."""
        groups = [group for group in self._layer_groups for _ in group["params"]]
        return [
            Holder.of_whole(names[working], working, master, group)
            for group, (working, master, _) in zip(groups, self.pairs, strict=True)
        ]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients."""
        for working, master, _ in self.pairs:
            working.grad = master.grad = None
            working.fp32_grad = None  # type: ignore[attr-defined]


def _merged(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one group for all layers of each weight decay, the only option in which layers' groups differ."""
    merged: dict[float, dict[str, Any]] = {}
    for group in groups:
        options = {key: value for key, value in group.items() if key not in ("params", "layer", "names")}
        merged.setdefault(group["weight_decay"], {**options, "params": []})["params"] += group["params"]
    return list(merged.values())


def _skips_on_device(optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
    """Whether the optimizer's kernel itself can skip a step, so that the host need not wait: torch's fused Adam can."""
    is_adam = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)
    return device.type == "cuda" and is_adam and all(group.get("fused") for group in optimizer.param_groups)


def gradient_of(parameter: nn.Parameter) -> torch.Tensor | None:
    """Return the accumulated gradient, in fp32_grad or grad; None for a layer that was skipped."""
    gradient = getattr(parameter, "fp32_grad", None)
    return parameter.grad if gradient is None else gradient


def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy each source into its target, with a few kernels for all; the lists may be empty."""
    if targets:
        torch._foreach_copy_(targets, sources)  # type: ignore[reportPrivateImportUsage]


def _move_gradient_to_fp32(parameter: torch.Tensor) -> None:
    assert parameter.grad is not None
    gathered = getattr(parameter, "fp32_grad", None)
    if gathered is None:
        parameter.fp32_grad = parameter.grad.float()  # type: ignore[attr-defined]
    else:
        gathered.add_(parameter.grad)
    parameter.grad = None
