"""Optimizer state by name, also for optimizers that count steps as DeepSpeed's fused ones do."""

from typing import Any

import torch
from torch import nn

from raptr_ds.engine.fragments import Holder, create_state, fragments_of, step_counts


class FusedLike(torch.optim.Optimizer):
    """Counts steps in an int on the last tensor of each group, as deepspeed/ops/adam/fused_adam.py does."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group.setdefault("step", 0)
            state: dict[str, Any] = {}
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(step=group["step"], exp_avg=torch.zeros_like(parameter))
                state["exp_avg"] += 1
            assert type(state["step"]) is int  # its kernel takes nothing else
            state["step"] += 1


def groups() -> list[dict[str, Any]]:
    return [
        {"params": [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]},
        {"params": [nn.Parameter(torch.ones(4))]},
    ]


def holders_of(optimizer: torch.optim.Optimizer) -> list[Holder]:
    found = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found.append(Holder.of_whole(f"p{len(found)}", parameter, parameter, group))
    return found


def train(optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()


def test_all_tensors_of_a_group_have_its_count() -> None:
    optimizer = FusedLike(groups())
    holders = holders_of(optimizer)
    assert step_counts(holders, optimizer) == {}
    train(optimizer, 3)
    assert optimizer.state[holders[0].flat]["step"] == 0  # what makes it necessary
    assert step_counts(holders, optimizer) == {"p0": 3.0, "p1": 3.0, "p2": 3.0}


def test_each_optimizer_gets_counts_as_it_keeps_them() -> None:
    kinds = {name: {"weight", "exp_avg"} for name in ("p0", "p1")}
    counts = {"p0": 3.0, "p1": 3.0}
    fused = FusedLike(groups())
    create_state(holders_of(fused), fused, kinds, counts)
    train(fused, 1)
    assert step_counts(holders_of(fused), fused) == {"p0": 4.0, "p1": 4.0, "p2": 1.0}
    adam = torch.optim.AdamW(groups())
    create_state(holders_of(adam), adam, {name: kinds["p0"] | {"exp_avg_sq"} for name in kinds}, counts)
    train(adam, 1)
    assert step_counts(holders_of(adam), adam) == {"p0": 4.0, "p1": 4.0, "p2": 1.0}


def test_state_that_a_checkpoint_lacks_is_dropped() -> None:
    adam = torch.optim.AdamW(groups())
    train(adam, 2)
    create_state(holders_of(adam), adam, {}, {})
    assert {fragment.kind for fragment in fragments_of(holders_of(adam), adam)} == {"weight"}
    assert step_counts(holders_of(adam), adam) == {}
    train(adam, 1)  # it begins anew by itself
    assert step_counts(holders_of(adam), adam) == {"p0": 1.0, "p1": 1.0, "p2": 1.0}


def test_a_state_that_the_optimizer_needs_is_asked_of_a_checkpoint_without_it() -> None:
    """torch would end with a KeyError in the first step; so the reader names what the checkpoint lacks."""
    adam = torch.optim.AdamW(groups(), amsgrad=True)
    moments = {name: {"weight", "exp_avg", "exp_avg_sq"} for name in ("p0", "p1")}
    create_state(holders_of(adam), adam, moments, {"p0": 3.0, "p1": 3.0})
    wanted = {fragment.name for fragment in fragments_of(holders_of(adam), adam) if fragment.kind == "max_exp_avg_sq"}
    assert wanted == {"p0", "p1"}
    train(adam, 1)
