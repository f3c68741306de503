"""DeepSpeed's ZeRO optimizers, made to work on the layers of the path alone: their gradients, steps and gathers.

Written against deepspeed 0.19.8 (runtime/zero/stage_1_and_2.py, stage3.py). Our parameter groups are layers
(parameter_groups.py), and DeepSpeed keeps what belongs to a group in lists with one entry for each. So a step on some
groups is DeepSpeed's own step while it sees those entries only; no line of its arithmetic is written again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

from raptr_ds.engine.gradient_norm import LossCheck, global_norm
from raptr_ds.engine.parameter_groups import NO_LAYER, every_layer, layer_of, layers_on
from raptr_ds.engine.prefetch import PathCoordinator, prefetch_along_paths
from raptr_ds.model.stage import Stage
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.parallel.layers import is_owner
from raptr_ds.parallel.uncompiled import without_compiler
from raptr_ds.paths.path import LayerPath

with without_compiler():
    # DeepSpeed imports this in the first reduction, whatever the optimizer (stage_1_and_2.py, average_tensor), and
    # compiles functions that only Muon calls, which we do not offer.
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

_GROUP_LISTS_12 = (
    "bit16_groups",
    "bit16_groups_flat",
    "parallel_partitioned_bit16_groups",
    "single_partition_of_fp32_groups",
    "partition_size",
    "params_in_partition",
    "params_not_in_partition",
    "real_dp_process_group",
    "round_robin_bit16_groups",
    "round_robin_bit16_meta",
    "round_robin_bit16_offsets",
    "round_robin_bit16_indices",
)
_GROUP_LISTS_3 = (
    "fp16_groups",
    "fp16_partitioned_groups",
    "fp16_partitioned_groups_flat",
    "fp32_partitioned_groups_flat",
    "sub_group_process_groups",
    "sub_group_to_group_id",
)


class PathZero:
    """What both of DeepSpeed's ZeRO optimizers need to follow a path; a mixin before them, see `follow_paths`."""

    process_groups: ProcessGroups
    layers: Mapping[nn.Parameter, int]
    runs: Callable[[int], bool]
    """Whether a layer runs in this step."""
    moves: Callable[[int], bool]
    """Whether this step changes a layer."""
    loss_check: LossCheck

    def follow(self, path: LayerPath, freezes: bool) -> None:
        """Train the next step along `path`; under `freeze` only its layers move, under `zero_grad` all."""
        self.runs = layers_on(path)
        self.moves = self.runs if freezes else every_layer

    def follow_micro_batch(self, path: LayerPath) -> None:
        """Train the next micro batch along `path`, which the step's path is or has as a share."""

    def follow_forward(self, path: LayerPath) -> None:
        """Run forward passes along `path`, without backward passes."""

    def _norm(self, owned: list[torch.Tensor]) -> torch.Tensor:
        """Return the norm over all ranks, negative (DeepSpeed's sign to skip the step) if it or the loss is not finite.

        One collective, where DeepSpeed has one for each group.
        """
        groups = self.process_groups
        norm = global_norm(owned, self.loss_check, groups.device, groups.world)
        return torch.where(torch.isfinite(norm), norm, torch.full_like(norm, -1.0))

    def check_overflow(self, partition_gradients: bool = True) -> None:
        """Look for nothing: the norm is not finite where a gradient is not, and DeepSpeed checks the norm next."""
        self.overflow = False


class PathZero12(PathZero, DeepSpeedZeroOptimizer):
    """ZeRO 1 and 2. A group that does not move gets no zero gradients, no step, no copy and no gather.

    Weights that have moved are gathered when they are next used (`gather`), not at once: where a layer also moves
    while it is skipped (`zero_grad`) the first gather would be for nothing.
    """

    stale: set[int]
    """Groups whose gathered weights are behind their fp32 partitions."""

    def _group_moves(self: Any, group: int) -> bool:
        return self.moves(self.optimizer.param_groups[group]["layer"])

    def get_all_grad_tensors(self: Any, tensor_list: list[nn.Parameter], dtype: torch.dtype) -> list[torch.Tensor]:
        """Return the accumulated gradients of a group's parameters; none where DeepSpeed would make zeros."""
        if tensor_list and not self.moves(self.layers[tensor_list[0]]):
            return []
        return super().get_all_grad_tensors(tensor_list, dtype)

    def get_flat_partition(self: Any, *args: Any, param_group_idx: int, **more: Any) -> Any:
        """Return this rank's part of a group's gradients, in pieces; none of a group that does not move."""
        if not self._group_moves(param_group_idx):
            return []
        return super().get_flat_partition(*args, param_group_idx=param_group_idx, **more)

    def _build_compact_grad_partition_buffer(self: Any, group_idx: int) -> Any:
        """Do the same where gradients accumulate in fp32 beside weights of 16 bits."""
        return super()._build_compact_grad_partition_buffer(group_idx) if self._group_moves(group_idx) else []

    def scaled_global_norm(self: Any, norm_type: int = 2) -> torch.Tensor:
        """Return the norm of the gradient partitions, each element of the model counted once."""
        owned = []
        for group, parameters in enumerate(self.params_in_partition):
            real = (g for g in self.averaged_gradients[group] if not getattr(g, "_zero_padding", False))
            owned += [g for g, p in zip(real, parameters, strict=False) if is_owner(p, self.process_groups)]
        return self._norm(owned)

    def step(self: Any, closure: Any = None) -> None:
        """Make DeepSpeed's step on the groups that move."""
        chosen = [group for group in range(len(self.bit16_groups)) if self._group_moves(group)]
        with (
            _only(self, _GROUP_LISTS_12, chosen, taken=("averaged_gradients", "all_grad_tensors")),
            _only(self.optimizer, ("param_groups",), chosen),
        ):
            self.bit16_groups_flat = []  # DeepSpeed gathers what is listed here
            super().step(closure)
        if not self.overflow:
            self.stale.update(chosen)

    def _update_model_bit16_weights(self, group_index: int) -> None:
        """Do nothing: the weights are views of the flat buffers since DeepSpeed built them."""

    def gather(self: Any, is_wanted: Callable[[int], bool]) -> None:
        """Gather the weights of the wanted layers where they have moved since they were last gathered."""
        chosen = [n for n in sorted(self.stale) if is_wanted(self.optimizer.param_groups[n]["layer"])]
        with _only(self, _GROUP_LISTS_12, chosen):
            all_gather_dp_groups(
                groups_flat=self.bit16_groups_flat,
                partitioned_param_groups=self.parallel_partitioned_bit16_groups,
                dp_process_group=self.real_dp_process_group,
                start_alignment_factor=self.nccl_start_alignment_factor,
                allgather_bucket_size=self.allgather_bucket_size,
            )
        self.stale.difference_update(chosen)

    @torch.no_grad()
    def refresh(self: Any, is_wanted: Callable[[int], bool]) -> None:
        """Let the working weights of the wanted layers follow from the fp32 ones."""
        for number, group in enumerate(self.optimizer.param_groups):
            if is_wanted(group["layer"]):
                rank = dist.get_rank(group=self.real_dp_process_group[number])
                partition = self.parallel_partitioned_bit16_groups[number][rank]
                partition.data.copy_(self.single_partition_of_fp32_groups[number].data)
                self.stale.add(number)


class PathZero3(PathZero, DeepSpeedZeroOptimizer_Stage3):
    """ZeRO 3. A group that does not move keeps its partition; its stale gradient is neither counted nor applied."""

    coordinator: PathCoordinator

    def follow(self, path: LayerPath, freezes: bool) -> None:
        """Train the next step along `path`.

        ZeRO 3 copies the gradients of the first micro batch over those of the last step and adds later ones
        (partition_grads): a layer that only a later micro batch takes must begin at zero.
        """
        super().follow(path, freezes)
        if path.shares:
            for parameter, layer in self.layers.items():
                if layer != NO_LAYER and not path.shares[0].is_active(layer):
                    self._gradient_partitions[parameter.ds_id].zero_()  # type: ignore[attr-defined]

    @property
    def _gradient_partitions(self) -> dict[int, torch.Tensor]:
        """Where ZeRO 3 accumulates each parameter's gradient, by DeepSpeed's number of it."""
        return vars(self)["_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"]

    def follow_micro_batch(self, path: LayerPath) -> None:
        """Train the next micro batch along `path`, fetching weights ahead by it."""
        self.coordinator.expect(path.layers, training=True)

    def follow_forward(self, path: LayerPath) -> None:
        """Run forward passes along `path`, fetching weights ahead by it."""
        self.coordinator.expect(path.layers, training=False)

    def _get_norm_groups(self: Any) -> list[torch.Tensor]:
        """Return the norm of the gradient partitions, after those of skipped layers have been cleared.

        ZeRO 3 keeps the gradient partition of a parameter that got no gradient in this step (partition_grads): it
        would count in the norm and be applied again.
        """
        owned = []
        for group, parameters in enumerate(self.fp16_groups):
            for gradient, parameter in zip(self.averaged_gradients[group], parameters, strict=True):
                if not self.runs(self.layers[parameter]):
                    gradient.zero_()
                elif is_owner(parameter, self.process_groups):
                    owned.append(gradient)
        return [self._norm(owned)]

    def step(self: Any, closure: Any = None) -> None:
        """Make DeepSpeed's step on the groups that move, and gather the path's small weights, which stay whole.

        Those of other layers are fetched with their layer, as any weight, when it is next active.
        """
        chosen = [n for n, parameters in enumerate(self.fp16_groups) if self.moves(self.layers[parameters[0]])]
        persistent = self.persistent_parameters
        self.persistent_parameters = [p for p in persistent if self.runs(self.layers[p])]
        try:
            with _only(self, _GROUP_LISTS_3, chosen, taken=("averaged_gradients",)):
                super().step(closure)
        finally:
            self.persistent_parameters = persistent

    def gather(self, is_wanted: Callable[[int], bool]) -> None:
        """Do nothing: weights are gathered as they are used."""

    @torch.no_grad()
    def refresh(self: Any, is_wanted: Callable[[int], bool]) -> None:
        """Let the working weights of the wanted layers follow from the fp32 ones."""
        self._partition_all_parameters()
        for number, parameters in enumerate(self.fp16_groups):
            if is_wanted(self.layers[parameters[0]]):
                self._reassign_or_swap_out_partitioned_parameters(number)


def follow_paths(optimizer: Any, process_groups: ProcessGroups, stage: Stage) -> None:
    """Give a ZeRO optimizer that DeepSpeed has built for `stage` the behaviour of this file.

    DeepSpeed names the class in its own code, so the object takes ours afterwards.
    """
    ours = {DeepSpeedZeroOptimizer: PathZero12, DeepSpeedZeroOptimizer_Stage3: PathZero3}
    optimizer.__class__ = ours[type(optimizer)]
    optimizer.process_groups = process_groups
    optimizer.layers = {parameter: layer_of(name) for name, parameter in stage.named_parameters()}
    optimizer.loss_check = LossCheck()
    optimizer.check_grad_overflow = True  # in every precision: DeepSpeed would apply a NaN in bf16 if told so
    if isinstance(optimizer, PathZero12):
        optimizer.stale = set()
    if isinstance(optimizer, PathZero3):
        optimizer.coordinator = prefetch_along_paths(optimizer.parameter_offload.get_param_coordinator(), stage.layers)


@contextmanager
def _only(owner: Any, names: Sequence[str], chosen: Sequence[int], taken: Sequence[str] = ()) -> Iterator[None]:
    """Let `owner` see the chosen entries of its attributes, numbered from 0.

    taken: dictionaries by group whose values are handed over, so that they are freed as they are used; they are left
    empty.
    """
    saved = {name: getattr(owner, name) for name in (*names, *taken)}
    for name in names:
        whole = saved[name]
        part = [whole[index] for index in chosen]
        setattr(owner, name, dict(enumerate(part)) if isinstance(whole, dict) else part)
    for name in taken:
        setattr(owner, name, {number: saved[name].pop(index, None) for number, index in enumerate(chosen)})
        saved[name].clear()
    try:
        yield
    finally:
        for name, value in saved.items():
            setattr(owner, name, value)
