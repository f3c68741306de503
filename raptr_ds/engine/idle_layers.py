"""Layers that sit out steps under `skipped_update: zero_grad`: their optimizer steps are made later, all at once."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from raptr_ds.engine.fragments import STEP, Holder, counter_like
from raptr_ds.engine.idle_decay import make_up_for


class IdleLayers:
    """Counts the steps that each layer has missed, and makes up for them when the layer is next active or looked at."""

    def __init__(self, optimizer: torch.optim.Optimizer, layers: Iterable[int]) -> None:
        self._optimizer = optimizer
        self._missed: dict[int, list[float]] = {layer: [] for layer in layers}
        self._counts: dict[int, float] = {}  # steps of each layer, as far as known: a GPU's own count is waited for

    @staticmethod
    def can_serve(optimizer: torch.optim.Optimizer) -> bool:
        """Whether this optimizer's steps with zero gradients are known in closed form: torch's AdamW."""
        plain = not any(group.get("amsgrad") or group.get("maximize") for group in optimizer.param_groups)
        return type(optimizer) is torch.optim.AdamW and plain

    def miss(self, moves: Callable[[int], bool], learning_rate: float) -> None:
        """Note a step that the layers which do not move have missed."""
        for layer, rates in self._missed.items():
            if not moves(layer):
                rates.append(learning_rate)
            elif layer in self._counts:
                self._counts[layer] += 1

    def make_up(self, holders: Sequence[Holder], is_wanted: Callable[[int], bool]) -> set[int]:
        """Make the missed steps of the wanted layers, on weights and states of `holders`; return the layers changed."""
        due = {layer: rates for layer, rates in self._missed.items() if rates and is_wanted(layer)}
        for holder in holders:
            layer = holder.group["layer"]
            if rates := due.get(layer):
                self._step(holder, layer, rates)
        for layer, rates in due.items():
            self._missed[layer] = []
            if layer in self._counts:
                self._counts[layer] += len(rates)
        return set(due)

    def missed_steps(self) -> dict[str, list[float]]:
        """Return, by layer, the learning rates of the missed steps; layers without any are left out."""
        return {str(layer): list(rates) for layer, rates in self._missed.items() if rates}

    def load(self, values: Mapping[str, Sequence[float]]) -> None:
        """Take over what `missed_steps` gave; layers of other pipeline stages are left out."""
        self._missed = {layer: list(values.get(str(layer), [])) for layer in self._missed}
        self.forget_counts()

    def forget_counts(self) -> None:
        """Look at the optimizer's step counts again: they were set from outside."""
        self._counts.clear()

    @torch.no_grad()
    def _step(self, holder: Holder, layer: int, rates: Sequence[float]) -> None:
        group, state = holder.group, self._optimizer.state[holder.flat]
        if not state:  # a layer that has never been active: only decay moves it
            state[STEP] = counter_like(self._optimizer, holder, 0.0)
            state.update({kind: torch.zeros_like(holder.flat).detach() for kind in ("exp_avg", "exp_avg_sq")})
        if layer not in self._counts:
            self._counts[layer] = float(state[STEP])
        make_up_for(
            holder.flat,
            state["exp_avg"],
            state["exp_avg_sq"],
            self._counts[layer],
            rates,
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )
        state[STEP] += len(rates)
