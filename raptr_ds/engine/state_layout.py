"""Where each ZeRO stage keeps the fp32 weights and the optimizer's states, as holders of named pieces."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from raptr_ds.engine.fragments import Holder, Piece
from raptr_ds.engine.replicated import ReplicatedOptimizer


def replicated_holders(optimizer: ReplicatedOptimizer, names: Mapping[nn.Parameter, str]) -> list[Holder]:
    """ZeRO 0: each parameter has its own fp32 tensor, whole."""
    holders = []
    working = {id(master): parameter for parameter, master, _ in optimizer.pairs}
    for group in optimizer.param_groups:
        for master in group["params"]:
            parameter = working[id(master)]
            shape = tuple(parameter.shape)
            piece = Piece(names[parameter], parameter, shape, 0, 0, master.numel())
            holders.append(Holder(master, group, (names[parameter],), (piece,)))
    return holders


def zero12_holders(optimizer: Any, names: Mapping[nn.Parameter, str]) -> list[Holder]:
    """ZeRO 1 and 2: a flat fp32 partition for each group; DeepSpeed's _hp_mapping says which runs it holds."""
    holders = []
    for index, group in enumerate(optimizer.optimizer.param_groups):
        pieces = []
        for parameter in optimizer.bit16_groups[index]:
            mapping = parameter._hp_mapping
            if mapping is None:
                continue
            low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
            shape = tuple(parameter.shape)
            pieces.append(Piece(names[parameter], parameter, shape, low.start, high.start, high.numel))
        flat = optimizer.single_partition_of_fp32_groups[index]
        holders.append(Holder(flat, group, tuple(group["names"]), tuple(pieces)))
    return holders


def zero3_holders(optimizer: Any, names: Mapping[nn.Parameter, str], data_rank: int) -> list[Holder]:
    """ZeRO 3: each parameter is cut into equal parts over the ranks; a sub-group's parts lie one behind the other."""
    holders = []
    for index, parameters in enumerate(optimizer.fp16_groups):
        group = optimizer.optimizer.param_groups[optimizer.sub_group_to_group_id[index]]
        pieces, start = [], 0
        for parameter in parameters:
            part = parameter.partition_numel()
            offset = part * data_rank
            size = max(0, min(part, parameter.ds_numel - offset))
            if size:
                pieces.append(Piece(names[parameter], parameter, tuple(parameter.ds_shape), offset, start, size))
            start += part
        flat = optimizer.fp32_partitioned_groups_flat[index]
        holders.append(Holder(flat, group, tuple(names[parameter] for parameter in parameters), tuple(pieces)))
    return holders
