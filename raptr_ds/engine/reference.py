"""The oracle of the tests: plain torch in one process, without DeepSpeed.

It computes in one simple way what the other engines compute in many.
"""

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from raptr_ds.data.batch import StepBatch
from raptr_ds.engine.fragments import Holder
from raptr_ds.engine.parameter_groups import is_decayed, layer_of
from raptr_ds.engine.protocol import Engine, StepResult
from raptr_ds.model.initialization import ends_branch
from raptr_ds.model.stage import Stage
from raptr_ds.parallel.dropout import DropoutStreams, dropout_keys
from raptr_ds.paths.growth import Growth
from raptr_ds.paths.path import LayerPath


class ReferenceEngine(Engine):
    """AdamW in fp32, each parameter in its own group."""

    def __init__(
        self,
        stage: Stage,
        seed: int,
        skipped_update: str,
        max_norm: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        self.stage, self.seed, self.skipped_update, self.max_norm = stage, seed, skipped_update, max_norm
        self.parameters = dict(stage.named_parameters())
        groups = [
            {"params": [p], "layer": layer_of(name), "weight_decay": weight_decay if is_decayed(p) else 0.0}
            for name, p in self.parameters.items()
        ]
        self.inner_optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps)

    def train_step(self, batch: StepBatch, path: LayerPath, step: int, learning_rate: float) -> StepResult:
        self.inner_optimizer.zero_grad(set_to_none=True)
        total = 0.0
        keys = dropout_keys(self.seed, step, self.stage.model.num_layers, batch.micro_batches[0].tokens.device)
        for number, micro in enumerate(batch.micro_batches):
            streams = DropoutStreams(keys, micro.sample_ids)
            taken = path.of_micro_batch(number, len(batch.micro_batches))
            loss = self.stage(micro.tokens, micro, taken, streams).sum() / batch.num_predictions
            loss.backward()
            total += loss.item()
        norm = float(nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None]))
        if not math.isfinite(norm) or not math.isfinite(total):
            return StepResult(total, norm, batch.num_predictions, skipped=True)
        for name, parameter in self.parameters.items():
            skipped = layer_of(name) >= 0 and not path.is_active(layer_of(name))
            assert (parameter.grad is None) or not skipped
            if skipped and self.skipped_update == "zero_grad":
                parameter.grad = torch.zeros_like(parameter)
        if self.max_norm > 0:
            nn.utils.clip_grad_norm_(self.parameters.values(), self.max_norm)
        for group in self.inner_optimizer.param_groups:
            group["lr"] = learning_rate
        before = {}
        if self.skipped_update == "freeze" and path.parts is not None:
            before = {
                p: (p.detach().clone(), copy.deepcopy(self.inner_optimizer.state[p])) for p in self.parameters.values()
            }
        self.inner_optimizer.step()  # torch does not change parameters without a gradient, which is what freeze means
        self._restore_idle_parts(path, before)
        return StepResult(total, norm, batch.num_predictions)

    @torch.no_grad()
    def _restore_idle_parts(
        self, path: LayerPath, before: Mapping[nn.Parameter, tuple[torch.Tensor, dict[str, Any]]]
    ) -> None:
        for name, parameter in self.parameters.items():
            if parameter not in before or not hasattr(parameter, "parts") or not path.is_active(layer_of(name)):
                continue
            kind, dim = parameter.parts  # type: ignore[attr-defined]
            assert path.parts is not None
            is_idle = torch.ones(path.parts.number, dtype=torch.bool)
            is_idle[list(getattr(path.parts, kind)[layer_of(name)])] = False
            is_idle = is_idle.repeat_interleave(parameter.shape[dim] // path.parts.number)
            is_idle = is_idle if dim == 0 and parameter.ndim == 1 else is_idle.unsqueeze(1 - dim).expand_as(parameter)
            weight, state = before[parameter]
            parameter[is_idle] = weight[is_idle]
            for moment in ("exp_avg", "exp_avg_sq"):
                now = self.inner_optimizer.state[parameter][moment]
                now[is_idle] = state[moment][is_idle] if state else 0.0

    @torch.no_grad()
    def evaluate(self, batches: Iterable[StepBatch], path: LayerPath) -> float:
        total, count = 0.0, 0
        for batch in batches:
            for micro in batch.micro_batches:
                total += self.stage(micro.tokens, micro, path, None).double().sum().item()
            count += batch.num_predictions
        return total / count

    @torch.no_grad()
    def grow(self, growth: Growth) -> None:
        for layer in growth.new_layers:
            for name, parameter in self.stage.layers[str(layer)].named_parameters(prefix=f"layers.{layer}"):
                if layer not in growth.sources:
                    self.inner_optimizer.state.pop(parameter, None)
                    if growth.init == "zero" and ends_branch(name):
                        parameter.zero_()
                    continue
                original = self.parameters[name.replace(f"layers.{layer}.", f"layers.{growth.sources[layer]}.", 1)]
                parameter.copy_(original)
                self.inner_optimizer.state.pop(parameter, None)
                if growth.copies_optimizer_state and original in self.inner_optimizer.state:
                    self.inner_optimizer.state[parameter] = copy.deepcopy(self.inner_optimizer.state[original])

    def _holders(self) -> list[Holder]:
        groups = self.inner_optimizer.param_groups
        return [
            Holder.of_whole(name, parameter, parameter, group)
            for group, (name, parameter) in zip(groups, self.parameters.items(), strict=True)
        ]
