"""DeepSpeed's ZeRO optimizers, restricted to the layers of a path: their gradients, steps and gathers.

Written against deepspeed 0.19.8 (runtime/zero/stage_1_and_2.py, stage3.py). Each of our parameter groups belongs to
one layer (parameter_groups.py), and DeepSpeed keeps what belongs to groups in lists with one entry for each group. So a
step of some layers is DeepSpeed's own step while its lists have the entries of these layers only (`_only_entries`), and
none of its arithmetic is repeated here. A step of layers 0 and 2:

                                     bit16_groups and other lists    averaged_gradients (by number of the group)
    before                           [w0, w1, w2, w3]                {0: g0, 1: [], 2: g2, 3: []}
    inside `with _only_entries`      [w0, w2]                        {0: g0, 1: g2}
    afterwards                       [w0, w1, w2, w3]                {}
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

from raptr_ds.engine.fragments import Geometry, Holder, Piece
from raptr_ds.engine.gradient_norm import LossCheck, clip_factor, global_norm
from raptr_ds.engine.parameter_groups import NO_LAYER, every_layer, layer_of, layers_on
from raptr_ds.engine.prefetch import PathCoordinator, prefetch_along_paths
from raptr_ds.engine.work_clock import WorkClock
from raptr_ds.model.stage import Stage
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.parallel.layers import is_owner
from raptr_ds.parallel.uncompiled import without_compiler
from raptr_ds.paths.path import LayerPath

with without_compiler():
    # DeepSpeed imports this in the first reduction, whatever the optimizer (stage_1_and_2.py, average_tensor), and
    # compiles functions that only Muon calls, which we do not offer.
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

# DeepSpeed's attributes that have an entry for each group, at stages 1 and 2, and at stage 3.
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
_PRIVATE_3 = "_DeepSpeedZeroOptimizer_Stage3__"


class PathZero:
    """What both of DeepSpeed's ZeRO optimizers need to follow a path: a mixin before them, see `follow_paths`."""

    process_groups: ProcessGroups
    layers: Mapping[nn.Parameter, int]
    """Each parameter's layer, or NO_LAYER."""
    runs: Callable[[int], bool]
    """Whether a layer runs in this step."""
    moves: Callable[[int], bool]
    """Whether this step changes a layer."""
    loss_check: LossCheck
    clock: WorkClock
    unscaled_norm: torch.Tensor
    factor: torch.Tensor | float
    """What unscales and clips the gradients of this step."""
    waiting: Sequence[str]
    """DeepSpeed's methods that reduce gradients or gather weights, with the other ranks."""

    def follow(self, path: LayerPath, freezes: bool) -> None:
        """Prepare for a training step along `path`, which changes only its layers if `freezes`, else all."""
        self.runs = layers_on(path)
        self.moves = self.runs if freezes else every_layer

    def follow_micro_batch(self, path: LayerPath) -> None:
        """Prepare for a micro batch along `path`: the step's path, or one of its several paths."""

    def follow_forward(self, path: LayerPath) -> None:
        """Prepare for forward passes along `path` without backward passes."""

    def finish_step(self, norm: float) -> None:
        """Do nothing: DeepSpeed has looked at the norm in `step`."""

    def _norm(self: Any, owned: list[torch.Tensor]) -> torch.Tensor:
        """Return the scaled norm of all ranks; -1, with which DeepSpeed skips the step, if it or a loss is not finite.

        This takes one collective, where DeepSpeed has one for each group. The factor that unscales and clips is
        computed here: DeepSpeed would wait for the device in each group to look at the norm once more (stages 1 and
        2), and unscale by the scale of the next step where a dynamic one grows after this step.
        """
        with self.clock.waiting():
            norm = global_norm(owned, self.loss_check, self.process_groups)
        self.unscaled_norm = norm / self.loss_scale
        self.factor = clip_factor(self.unscaled_norm, self.clip_grad) / self.loss_scale
        return torch.where(torch.isfinite(norm), norm, torch.full_like(norm, -1.0))

    def _unscale_and_clip(self, gradient: torch.Tensor) -> None:
        if isinstance(self.factor, torch.Tensor) or self.factor != 1.0:
            gradient.mul_(self.factor)

    def check_overflow(self, partition_gradients: bool = True) -> None:
        """Find no overflow: if a gradient is not finite the norm is not either, and DeepSpeed checks that next."""
        self.overflow = False


class PathZero12(PathZero, DeepSpeedZeroOptimizer):
    """ZeRO 1 and 2. Groups that do not move get no zero gradients, no step, no copy and no gather.

    Weights that have moved are gathered when they are next used, not at once: under `zero_grad` a skipped
    layer moves in many steps before it is used.
    """

    waiting = ("average_tensor", "independent_gradient_partition_epilogue")
    stale: set[int]
    """Groups whose fp32 partitions have changed since their weights were gathered."""

    def follow(self, path: LayerPath, freezes: bool) -> None:
        """Prepare for a training step along `path`."""
        super().follow(path, freezes)
        self._gather(self.runs)

    def follow_forward(self, path: LayerPath) -> None:
        """Prepare for forward passes along `path` without backward passes."""
        self._gather(layers_on(path))

    def _group_moves(self: Any, group: int) -> bool:
        return self.moves(self.optimizer.param_groups[group]["layer"])

    def get_all_grad_tensors(self: Any, tensor_list: list[nn.Parameter], dtype: torch.dtype) -> list[torch.Tensor]:
        """Return the accumulated gradients of a group's parameters; [] if the group does not move."""
        if tensor_list and not self.moves(self.layers[tensor_list[0]]):
            return []
        return super().get_all_grad_tensors(tensor_list, dtype)

    def get_flat_partition(self: Any, *args: Any, param_group_idx: int, **more: Any) -> Any:
        """Return this rank's part of a group's gradients, in pieces; [] if the group does not move."""
        if not self._group_moves(param_group_idx):
            return []
        return super().get_flat_partition(*args, param_group_idx=param_group_idx, **more)

    def _build_compact_grad_partition_buffer(self: Any, group_idx: int) -> Any:
        """Return the same when gradients of 16-bit weights accumulate in fp32."""
        return super()._build_compact_grad_partition_buffer(group_idx) if self._group_moves(group_idx) else []

    def scaled_global_norm(self: Any, norm_type: int = 2) -> torch.Tensor:
        """Return the norm of the gradient partitions, each element of the model counted once."""
        owned = []
        for group, parameters in enumerate(self.params_in_partition):
            real = (g for g in self.averaged_gradients[group] if not getattr(g, "_zero_padding", False))
            owned += [g for g, p in zip(real, parameters, strict=False) if is_owner(p, self.process_groups)]
        return self._norm(owned)

    def unscale_and_clip_grads(self: Any, grad_groups_flat: list[torch.Tensor], total_norm: torch.Tensor) -> None:
        """Multiply a group's gradients by the step's factor."""
        for gradient in grad_groups_flat:
            self._unscale_and_clip(gradient)

    def step(self: Any, closure: Any = None) -> None:
        """Make DeepSpeed's step on the groups that move."""
        chosen = [group for group in range(len(self.bit16_groups)) if self._group_moves(group)]
        with (
            _only_entries(self, _GROUP_LISTS_12, chosen, consumed=("averaged_gradients", "all_grad_tensors")),
            _only_entries(self.optimizer, ("param_groups",), chosen),
        ):
            self.bit16_groups_flat = []  # DeepSpeed gathers what is listed here
            super().step(closure)
        if not self.overflow:
            self.stale.update(chosen)

    def _update_model_bit16_weights(self, group_index: int) -> None:
        """Do nothing: the weights are views of the flat buffers since DeepSpeed built them."""

    def _gather(self: Any, is_wanted: Callable[[int], bool]) -> None:
        """Gather the weights of the wanted layers that have moved since they were last gathered."""
        chosen = [n for n in sorted(self.stale) if is_wanted(self.optimizer.param_groups[n]["layer"])]
        with _only_entries(self, _GROUP_LISTS_12, chosen):
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
        """Copy the fp32 weights of the wanted layers to the working weights."""
        for number, group in enumerate(self.optimizer.param_groups):
            if is_wanted(group["layer"]):
                rank = dist.get_rank(group=self.real_dp_process_group[number])
                partition = self.parallel_partitioned_bit16_groups[number][rank]
                partition.data.copy_(self.single_partition_of_fp32_groups[number].data)
                self.stale.add(number)

    def holders(self: Any, names: Mapping[nn.Parameter, str]) -> list[Holder]:
        """Return where weights and states lie: a flat fp32 partition for each group, of its parameters in a row.

        Not by DeepSpeed's _hp_mapping, which is of another order under round_robin_gradients (deepspeed 0.19.8,
        stage_1_and_2.py, _link_all_hp_params): weights and states would be saved and copied under each other's names.
        """
        holders = []
        for index, group in enumerate(self.optimizer.param_groups):
            size = self.partition_size[index]
            begin = size * dist.get_rank(group=self.real_dp_process_group[index])
            pieces = []
            placed = zip(self.round_robin_bit16_groups[index], self.round_robin_bit16_offsets[index], strict=True)
            for parameter, offset in placed:
                first, end = max(offset, begin), min(offset + parameter.numel(), begin + size)
                if first < end:
                    geometry = Geometry.of_run(parameter, parameter.shape, first - offset, end - first)
                    pieces.append(Piece(names[parameter], geometry, first - begin))
            flat = self.single_partition_of_fp32_groups[index]
            holders.append(Holder(flat, group, tuple(group["names"]), tuple(pieces)))
        return holders


class PathZero3(PathZero, DeepSpeedZeroOptimizer_Stage3):
    """ZeRO 3. Groups that do not move keep their partitions; gradients left from earlier steps are not applied."""

    waiting = (_PRIVATE_3 + "reduce_and_partition_ipg_grads", "_post_step")
    coordinator: PathCoordinator

    def follow(self, path: LayerPath, freezes: bool) -> None:
        """Prepare for a training step along `path`.

        ZeRO 3 overwrites the last step's gradients by those of the first micro batch and adds later ones
        (partition_grads), so the gradient of a layer that only a later micro batch runs must be cleared.
        """
        super().follow(path, freezes)
        if path.shares:
            accumulated = vars(self)[_PRIVATE_3 + "param_id_to_grad_partition"]  # by DeepSpeed's number of a parameter
            for parameter, layer in self.layers.items():
                if layer != NO_LAYER and not path.shares[0].is_active(layer):
                    accumulated[parameter.ds_id].zero_()  # type: ignore[attr-defined]

    def follow_micro_batch(self, path: LayerPath) -> None:
        """Prefetch weights along `path` in the next micro batch."""
        if path.parts is not None:
            self.coordinator.read_in_parts()
        self.coordinator.expect(path.layers, training=True)

    def follow_forward(self, path: LayerPath) -> None:
        """Prefetch weights along `path` in the next forward passes, which no backward passes follow."""
        self.coordinator.expect(path.layers, training=False)

    def _get_norm_groups(self: Any) -> list[torch.Tensor]:
        """Return the norm of the gradient partitions, after clearing those of skipped layers.

        ZeRO 3 keeps the gradient partition of a parameter that got no gradient in this step (partition_grads), which
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

    def unscale_and_clip_grads(self: Any, sub_group_id: int, total_norm: torch.Tensor) -> None:
        """Multiply a sub-group's gradients by the step's factor."""
        self._unscale_and_clip(self.fp32_partitioned_groups_flat[sub_group_id].grad)

    def step(self: Any, closure: Any = None) -> None:
        """Make DeepSpeed's step on the groups that move, and gather the path's small weights, which stay gathered.

        Those of skipped layers are fetched like any weight when their layer is next active.
        """
        chosen = [n for n, parameters in enumerate(self.fp16_groups) if self.moves(self.layers[parameters[0]])]
        small = [n for n, parameter in enumerate(self.persistent_parameters) if self.runs(self.layers[parameter])]
        with (
            _only_entries(self, _GROUP_LISTS_3, chosen, consumed=("averaged_gradients",)),
            _only_entries(self, ("persistent_parameters",), small),
            self.clock.working(),
        ):
            super().step(closure)
        if not self.overflow:
            self._global_grad_norm = self.unscaled_norm  # DeepSpeed's is divided by the next step's scale

    @torch.no_grad()
    def refresh(self: Any, is_wanted: Callable[[int], bool]) -> None:
        """Copy the fp32 weights of the wanted layers to the working weights."""
        self._partition_all_parameters()
        for number, parameters in enumerate(self.fp16_groups):
            if is_wanted(self.layers[parameters[0]]):
                self._reassign_or_swap_out_partitioned_parameters(number)

    def holders(self: Any, names: Mapping[nn.Parameter, str]) -> list[Holder]:
        """Return where weights and states lie: a flat tensor for each sub-group, with equal parts of its parameters."""
        holders = []
        for index, parameters in enumerate(self.fp16_groups):
            group = self.optimizer.param_groups[self.sub_group_to_group_id[index]]
            pieces, start = [], 0
            for parameter in parameters:
                part = parameter.partition_numel()
                offset = part * self.process_groups.data_rank
                size = max(0, min(part, parameter.ds_numel - offset))
                if size:
                    geometry = Geometry.of_run(parameter, parameter.ds_shape, offset, size)
                    pieces.append(Piece(names[parameter], geometry, start))
                start += part
            flat = self.fp32_partitioned_groups_flat[index]
            holders.append(Holder(flat, group, tuple(names[parameter] for parameter in parameters), tuple(pieces)))
        return holders


def follow_paths(optimizer: Any, process_groups: ProcessGroups, stage: Stage, clock: WorkClock) -> None:
    """Turn a ZeRO optimizer that DeepSpeed has built for `stage` into a PathZero12 or PathZero3.

    DeepSpeed's engine names the class that it builds (runtime/engine.py, _configure_zero_optimizer), so a subclass can
    only be set afterwards. Ours override methods and have no constructor; the attributes they need are set here.
    """
    subclasses = {DeepSpeedZeroOptimizer: PathZero12, DeepSpeedZeroOptimizer_Stage3: PathZero3}
    optimizer.__class__ = subclasses[type(optimizer)]
    optimizer.process_groups = process_groups
    optimizer.layers = {parameter: layer_of(name) for name, parameter in stage.named_parameters()}
    optimizer.loss_check, optimizer.clock = LossCheck(), clock
    for name in optimizer.waiting:
        uncounted: Any = clock.waiting()
        setattr(optimizer, name, uncounted(getattr(optimizer, name)))
    optimizer.check_grad_overflow = True  # in every precision: bf16.check_grad_overflow=false would apply a NaN
    if isinstance(optimizer, PathZero12):
        optimizer.stale = set()
    if isinstance(optimizer, PathZero3):
        coordinator = optimizer.parameter_offload.get_param_coordinator()
        optimizer.coordinator = prefetch_along_paths(coordinator, stage.layers, clock)


@contextmanager
def _only_entries(
    owner: Any, names: Sequence[str], chosen: Sequence[int], consumed: Sequence[str] = ()
) -> Iterator[None]:
    """Reduce attributes of `owner`, lists or dictionaries by number, to the chosen entries, numbered from 0.

    consumed: dictionaries whose values are moved, not copied, so that DeepSpeed frees gradients as it uses
    them; they are empty afterwards.
    """
    saved = {name: getattr(owner, name) for name in (*names, *consumed)}
    for name in names:
        entries = saved[name]
        kept = [entries[index] for index in chosen]
        setattr(owner, name, dict(enumerate(kept)) if isinstance(entries, dict) else kept)
    for name in consumed:
        setattr(owner, name, {number: saved[name].pop(index, None) for number, index in enumerate(chosen)})
        saved[name].clear()
    try:
        yield
    finally:
        for name, value in saved.items():
            setattr(owner, name, value)
