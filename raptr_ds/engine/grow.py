"""Growing a model: new layers become copies of other layers, on whatever ranks these are, or begin afresh."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from raptr_ds.engine.fragments import WEIGHT, Fragment, Holder, create_state, fragments_of, step_counts
from raptr_ds.engine.parameter_groups import layer_of
from raptr_ds.model.initialization import ends_branch
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
    if growth.copies_optimizer_state:
        kinds, counts = _layer_states(holders, optimizer, groups)
    else:
        kinds, counts = {}, {}
    for layer in growth.new_layers:
        new = [holder for holder in holders if holder.group["layer"] == layer]
        source = sources.get(layer, layer)
        names = {name: _in_layer(name, source) for holder in new for name in holder.names}
        create_state(
            new,
            optimizer,
            {name: kinds[original] for name, original in names.items() if original in kinds},
            {name: counts[original] for name, original in names.items() if original in counts},
        )
    fragments = fragments_of(holders, optimizer)
    if growth.init == "zero":
        for fragment in fragments:
            if fragment.kind == WEIGHT and layer_of(fragment.name) in growth.new_layers and ends_branch(fragment.name):
                fragment.data.zero_()
    places = _stages_of(holders, groups)
    for layer, source in sources.items():  # in the same order on all ranks, so that sends and receives match
        from_stage, to_stage = places[source], places[layer]
        old = _ordered(f for f in fragments if layer_of(f.name) == source)
        new = _ordered(f for f in fragments if layer_of(f.name) == layer)
        if not growth.copies_optimizer_state:
            old = [fragment for fragment in old if fragment.kind == WEIGHT]
        if from_stage == to_stage == groups.pipeline_rank:
            for target, original in zip(new, old, strict=True):
                is_same = (target.kind, target.geometry) == (original.kind, original.geometry)
                assert is_same, "layers are cut differently"
                target.data.copy_(original.data)
        elif groups.pipeline_rank == from_stage:
            for original in old:
                dist.send(original.data.to(groups.device), _rank_of(to_stage, groups), group=groups.pipeline)
        elif groups.pipeline_rank == to_stage:
            for target in new:
                received = torch.empty_like(target.data, device=groups.device)
                dist.recv(received, _rank_of(from_stage, groups), group=groups.pipeline)
                target.data.copy_(received)


def _layer_states(
    holders: Sequence[Holder], optimizer: torch.optim.Optimizer, groups: ProcessGroups
) -> tuple[dict[str, set[str]], dict[str, float]]:
    """Return the kinds of state and the step counts of every parameter of `holders` on all pipeline stages."""
    kinds: dict[str, set[str]] = {}
    for fragment in fragments_of(holders, optimizer):
        kinds.setdefault(fragment.name, set()).add(fragment.kind)
    all_kinds, all_counts = _gathered(kinds, groups), _gathered(step_counts(holders, optimizer), groups)
    return all_kinds, all_counts


def _stages_of(holders: Iterable[Holder], groups: ProcessGroups) -> dict[int, int]:
    """Return the pipeline stage of each layer."""
    return _gathered({holder.group["layer"]: groups.pipeline_rank for holder in holders}, groups)


def _gathered(values: dict[Any, Any], groups: ProcessGroups) -> dict[Any, Any]:
    """Return the entries of all pipeline stages."""
    if groups.topology.pipeline == 1:
        return values
    parts: list[Any] = [None] * groups.topology.pipeline
    dist.all_gather_object(parts, values, group=groups.pipeline)
    return {key: value for part in parts for key, value in part.items()}


def _rank_of(stage: int, groups: ProcessGroups) -> int:
    return dist.get_global_rank(groups.pipeline, stage)


def _in_layer(name: str, layer: int) -> str:
    """Return the name of the same parameter in another layer."""
    return f"layers.{layer}.{name.split('.', 2)[2]}"


def _ordered(fragments: Iterable[Fragment]) -> list[Fragment]:
    return sorted(fragments, key=lambda f: (f.name.split(".", 2)[2], f.kind, f.geometry.offset))
