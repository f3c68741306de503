"""Parts of a layer that do not run stay as they are, whatever the optimizer does with a gradient of zero."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from raptr_ds.engine.fragments import state_kinds
from raptr_ds.engine.idle_parts import idle_parts_kept
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.parallel.layers import mark_parts
from raptr_ds.paths.path import Parts

OPTIMIZERS: dict[str, Callable[[nn.Parameter], torch.optim.Optimizer]] = {
    "AdamW": lambda weight: torch.optim.AdamW([weight], lr=0.1, weight_decay=0.1),
    "Adam": lambda weight: torch.optim.Adam([weight], lr=0.1, weight_decay=0.1, amsgrad=True),
    "SGD": lambda weight: torch.optim.SGD([weight], lr=0.1, weight_decay=0.1, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_idle_heads_keep_weights_and_states_that_begin_at_zero(name: str, groups: ProcessGroups) -> None:
    weight = nn.Parameter(torch.ones(8, 2))
    mark_parts(weight, "heads", 0)
    optimizer = OPTIMIZERS[name](weight)
    for head in (0, 0, 1):
        weight.grad = torch.zeros(8, 2)
        weight.grad[4 * head : 4 * head + 4] = 1.0
        before = [weight.detach().clone()]
        before += [optimizer.state[weight][kind].clone() for kind in state_kinds(optimizer.state[weight], weight)]
        with idle_parts_kept(optimizer, [(weight, weight, 0)], Parts(2, ((head,),), ((0,),)), groups):
            optimizer.step()
        kinds = state_kinds(optimizer.state[weight], weight)
        assert kinds
        before = before if len(before) > 1 else before + [torch.zeros(8, 2)] * len(kinds)
        now = [weight.detach(), *(optimizer.state[weight][kind] for kind in kinds)]
        idle, active = slice(4 - 4 * head, 8 - 4 * head), slice(4 * head, 4 * head + 4)
        for was, tensor in zip(before, now, strict=True):
            assert torch.equal(tensor[idle], was[idle])
            assert not torch.equal(tensor[active], was[active])
