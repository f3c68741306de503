"""Growing a model: new layers become copies of other layers, on whatever ranks these are, or begin afresh."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from raptr_ds.engine.fragments import WEIGHT, Holder, create_state, fragments_of, step_counts
from raptr_ds.engine.parameter_groups import layer_of
from raptr_ds.model.initialization import ends_branch
from raptr_ds.parallel.agreement import gathered
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.paths.growth import Growth


def grow_layers(
    holders: Sequence[Holder], optimizer: torch.optim.Optimizer, growth: Growth, groups: ProcessGroups
) -> None:
    """Give a growth's new layers in `holders` the weights (fp32) and optimizer state that they begin with. Collective.

    A layer that is no copy has its initial weights, as nothing has trained it yet. All layers have the same shapes
    and the same parameter groups, so every layout cuts them in the same way: the part of the old layer that a rank
    needs is on this rank or on the rank at the same place in another pipeline stage.
    """
    sources = growth.sources
    involved = {*growth.new_layers, *sources.values()}
    holders = [holder for holder in holders if holder.group["layer"] in involved]
    stages = _of_all_stages({holder.group["layer"]: groups.pipeline_rank for holder in holders}, groups)
    new = [holder for holder in holders if holder.group["layer"] in growth.new_layers]
    kinds, counts = {}, {}
    if growth.copies_optimizer_state:
        for fragment in fragments_of(holders, optimizer):
            kinds.setdefault(fragment.name, set()).add(fragment.kind)
        kinds, counts = _of_all_stages(kinds, groups), _of_all_stages(step_counts(holders, optimizer), groups)
        originals = {name: _in_layer(name, sources[layer_of(name)]) for holder in new for name in holder.names}
        kinds = {name: kinds[original] for name, original in originals.items() if original in kinds}
        counts = {name: counts[original] for name, original in originals.items() if original in counts}
    create_state(new, optimizer, kinds, counts)
    fragments = sorted(fragments_of(holders, optimizer), key=lambda f: (f.name, f.kind, f.geometry.offset))
    if growth.init == "zero":
        for fragment in fragments:
            if fragment.kind == WEIGHT and layer_of(fragment.name) in growth.new_layers and ends_branch(fragment.name):
                fragment.data.zero_()
    for layer, source in sources.items():  # in the same order on all ranks, so that sends and receives match
        from_stage, to_stage = stages[source], stages[layer]
        targets = [f for f in fragments if layer_of(f.name) == layer]
        copied = [f for f in fragments if layer_of(f.name) == source]
        if not growth.copies_optimizer_state:
            copied = [fragment for fragment in copied if fragment.kind == WEIGHT]
        if from_stage == to_stage == groups.pipeline_rank:
            for target, original in zip(targets, copied, strict=True):
                is_same = (target.kind, target.geometry) == (original.kind, original.geometry)
                assert is_same, "layers are cut differently"
                target.data.copy_(original.data)
        elif groups.pipeline_rank == from_stage:
            for original in copied:
                dist.send(original.data.to(groups.device), group=groups.pipeline, group_dst=to_stage)
        elif groups.pipeline_rank == to_stage:
            for target in targets:
                received = torch.empty_like(target.data, device=groups.device)
                dist.recv(received, group=groups.pipeline, group_src=from_stage)
                target.data.copy_(received)


def _in_layer(name: str, layer: int) -> str:
    """Return the name of the same parameter in another layer."""
    return f"layers.{layer}.{name.split('.', 2)[2]}"


def _of_all_stages(values: dict[Any, Any], groups: ProcessGroups) -> dict[Any, Any]:
    """Return the entries of all pipeline stages."""
    if groups.topology.pipeline == 1:
        return values
    return {key: value for part in gathered(values, groups.pipeline) for key, value in part.items()}
