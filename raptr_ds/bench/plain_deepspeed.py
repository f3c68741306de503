"""DeepSpeed as its users write it, around any module: what the benchmark compares our engines with."""

from collections.abc import Iterable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from raptr_ds.engine.deepspeed_engine import start_deepspeed_comm, without_idle_zero
from raptr_ds.engine.parameter_groups import is_decayed

_NOT_PRINTING = 1 << 60


class PlainDeepSpeed:
    """`deepspeed.initialize` on a module, and its engine's backward and step; data parallel only."""

    def __init__(self, module: nn.Module, config: dict[str, Any]) -> None:
        """Train `module` by DeepSpeed's configuration `config`, in place; biases and norms without weight decay.

        As in our engines ZeRO 1 and 2 are left out where they only copy.
        """
        start_deepspeed_comm()
        config = without_idle_zero(config, dist.get_world_size())
        parameters = list(module.parameters())
        groups = [
            {"params": [p for p in parameters if is_decayed(p)]},
            {"params": [p for p in parameters if not is_decayed(p)], "weight_decay": 0.0},
        ]
        self.engine: Any = deepspeed.initialize(
            model=module,
            model_parameters=groups,  # type: ignore[arg-type]
            config={**config, "steps_per_print": _NOT_PRINTING},
            dist_init_required=False,
        )[0]

    def step(self, losses: Iterable[torch.Tensor]) -> float:
        """Train on the losses of a step's micro batches, each computed when it is its turn; return their mean.

        DeepSpeed divides each by their number.
        """
        total, count = torch.zeros(()), 0
        for loss in losses:
            self.engine.backward(loss)
            self.engine.step()
            total, count = total.to(loss.device) + loss.detach(), count + 1
        return total.item() / count
