"""ZeRO 3's prefetching along a path that changes with every step.

DeepSpeed records the order in which one step visits the modules and fetches weights ahead by it; a step that takes
another path makes it forget the order and fetch each weight only when it is needed (runtime/zero/
partitioned_param_coordinator.py of deepspeed 0.19.8, trace_prologue). A step's order is made of known pieces, though:
what comes before the layers, each layer forward, the head, each layer backward, what comes after. So one recorded
step, of any path, gives the order of every path, and the next path is always known before the step begins. A step that
recomputes activations visits its layers in another order than one that keeps them: of each kind one is recorded.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from deepspeed.runtime.zero.partitioned_param_coordinator import (
    PartitionedParameterCoordinator,
    ZeRoTraceMode,
    iter_params,
)
from torch import nn

from raptr_ds.model.stack import Stack

_PRIVATE = "_PartitionedParameterCoordinator__"


@dataclass(frozen=True)
class VisitOrder:
    """The order in which a step visits modules, for every path.

    before, head_forward, head_backward, after: modules outside the layers; forward, backward: names of the modules
    inside a layer, "" the layer itself.
    """

    before: tuple[nn.Module, ...]
    forward: tuple[str, ...]
    head_forward: tuple[nn.Module, ...]
    head_backward: tuple[nn.Module, ...]
    backward: tuple[str, ...]
    after: tuple[nn.Module, ...]

    def along(self, layers: Sequence[int], modules: dict[int, dict[str, nn.Module]], training: bool) -> list[nn.Module]:
        """Return the modules that a step along `layers` visits, in order; of its forward pass if it does not train."""
        order = [*self.before, *(modules[layer][name] for layer in layers for name in self.forward)]
        order += self.head_forward
        if training:
            order += self.head_backward
            order += [modules[layer][name] for layer in reversed(layers) for name in self.backward]
            order += self.after
        return order


def learn_order(
    visits: Sequence[nn.Module], first_backward: int, layers: Sequence[int], modules: dict[int, dict[str, nn.Module]]
) -> VisitOrder | None:
    """Return the order behind a recorded training step along `layers`; None if it is not made of the known pieces.

    first_backward: how many visits belong to the forward pass.
    """
    places = {module: (layer, name) for layer, inside in modules.items() for name, module in inside.items()}
    forward_pass = _pieces(visits[:first_backward], places)
    backward_pass = _pieces(visits[first_backward:], places)
    if forward_pass is None or backward_pass is None:
        return None
    before, forward_layers, head_forward = forward_pass
    head_backward, backward_layers, after = backward_pass
    names = {tuple(inside) for _, inside in forward_layers}, {tuple(inside) for _, inside in backward_layers}
    if (
        [layer for layer, _ in forward_layers] != list(layers)
        or [layer for layer, _ in backward_layers] != list(reversed(layers))
        or any(len(found) != 1 for found in names)
    ):
        return None
    return VisitOrder(
        before, names[0].pop(), head_forward, head_backward=head_backward, backward=names[1].pop(), after=after
    )


def _pieces(
    visits: Sequence[nn.Module], places: dict[nn.Module, tuple[int, str]]
) -> tuple[tuple[nn.Module, ...], list[tuple[int, list[str]]], tuple[nn.Module, ...]] | None:
    """Cut one pass into what precedes the layers, each layer's visits by name, and what follows; None if mixed."""
    inside = [number for number, module in enumerate(visits) if module in places]
    if not inside or inside != list(range(inside[0], inside[-1] + 1)):
        return None
    layers: list[tuple[int, list[str]]] = []
    for module in visits[inside[0] : inside[-1] + 1]:
        layer, name = places[module]
        if not layers or layers[-1][0] != layer:
            layers.append((layer, []))
        layers[-1][1].append(name)
    return tuple(visits[: inside[0]]), layers, tuple(visits[inside[-1] + 1 :])


class PathCoordinator(PartitionedParameterCoordinator):
    """DeepSpeed's coordinator, told the path of each forward pass before it begins; see `prefetch_along_paths`."""

    modules: dict[int, dict[str, nn.Module]]
    recomputes: Callable[[int], bool]
    """Whether a training step along so many layers recomputes their activations."""
    orders: dict[bool, VisitOrder]
    """The order of steps that recompute, and of those that do not, once one of them was recorded."""
    num_restarts: int
    """How often an order turned out wrong, so that weights were fetched only when needed."""
    _expected: tuple[tuple[int, ...], bool]
    _installed: tuple[tuple[int, ...], bool] | None
    _recorded: tuple[tuple[int, ...], bool]
    _first_backward: int | None
    _uses: dict[nn.Parameter, list[int]]
    _numel_before: list[int]

    def expect(self, layers: tuple[int, ...], training: bool) -> None:
        """Say which layers the next forward passes take, and whether backward passes follow."""
        self._expected = (layers, training)

    def reset_step(self: Any) -> None:
        """Begin a forward pass: DeepSpeed calls this before the model's first module."""
        if self.is_record_trace():
            self._learn(*self._recorded)
        order = self._order_of(*self._expected)
        if order is None:
            self._record_anew_for(*self._expected)
        elif self._installed != self._expected:
            self._install(order.along(self._expected[0], self.modules, self._expected[1]))
            self._installed = self._expected
        super().reset_step()
        self._recorded, self._first_backward = self._expected, None

    def _learn(self: Any, layers: tuple[int, ...], training: bool) -> None:
        """Take the order behind what was recorded, if that was a whole training step."""
        if training and self._first_backward is not None:
            order = learn_order(self._get("submodule_order"), self._first_backward, layers, self.modules)
            if order is not None:
                self.orders[self.recomputes(len(layers))] = order

    def _order_of(self, layers: tuple[int, ...], training: bool) -> VisitOrder | None:
        """Return the order of the next forward passes; without backward passes all orders are alike."""
        if training:
            return self.orders.get(self.recomputes(len(layers)))
        return next(iter(self.orders.values()), None)

    def _record_anew_for(self: Any, layers: tuple[int, ...], training: bool) -> None:
        """Let DeepSpeed record the next step rather than expect what it has, if that is of the other kind."""
        had, of_training = self._recorded
        is_other = training and of_training and self.recomputes(len(had)) != self.recomputes(len(layers))
        if (is_other or self._installed is not None) and not self.is_invalid_trace():
            super()._invalidate_trace()
        self._installed = None

    def fetch_sub_module(self: Any, current_submodule: nn.Module, forward: bool) -> None:
        """Fetch as DeepSpeed does, and note where a recorded step turns backward."""
        if not forward and self._first_backward is None and self.is_record_trace():
            self._first_backward = len(self._get("submodule_order")) - 1
        super().fetch_sub_module(current_submodule, forward)

    def _invalidate_trace(self: Any) -> None:
        """Forget what was installed: DeepSpeed met another module, and will record anew."""
        self.num_restarts += 1
        self.orders.clear()
        self._installed = None
        super()._invalidate_trace()

    def _install(self: Any, order: list[nn.Module]) -> None:
        """Make DeepSpeed take `order` for recorded."""
        entry = getattr(PartitionedParameterCoordinator, _PRIVATE + "ParamInTrace")
        trace, self._uses, self._numel_before = [], {}, [0]
        for number, module in enumerate(order):
            parameters = _weights_of(module)
            for parameter in parameters:
                trace.append(entry(param=parameter, step_id_last_used_at=number))
                self._uses.setdefault(parameter, []).append(number)
            self._numel_before.append(self._numel_before[-1] + sum(p.ds_numel for p in parameters))
        self._set("submodule_order", tuple(order))
        self._set("param_order", tuple(trace))
        self._set("trace_mode", ZeRoTraceMode.COMPLETE)

    def _PartitionedParameterCoordinator__params_to_release(  # noqa: N802 - DeepSpeed's private name
        self: Any, module: nn.Module, visit: int
    ) -> set[int]:
        """Return the ids of a module's weights that are not needed again soon: within max_reuse_distance elements.

        DeepSpeed's own answer is cached by the visit's number, for one order, and scans all that follows, which for an
        order that changes with each step costs as much as a small step.
        """
        if self._installed is None:  # DeepSpeed's own order
            return getattr(PartitionedParameterCoordinator, _PRIVATE + "params_to_release")(self, module, visit)
        farthest = self._numel_before[visit] + self._get("max_reuse_dist_in_numel")
        fetched_for = self._get("most_recent_step_id_param_fetched_for")
        released = set()
        for parameter in _weights_of(module):
            uses = self._uses.get(parameter, [])
            following = bisect_left(uses, visit)
            is_reused = following < len(uses) and self._numel_before[uses[following]] < farthest
            if not parameter.ds_persist and not is_reused and fetched_for[parameter] <= visit:
                released.add(parameter.ds_id)
        return released

    def _get(self, name: str) -> Any:
        return getattr(self, _PRIVATE + name)

    def _set(self, name: str, value: Any) -> None:
        setattr(self, _PRIVATE + name, value)


def _weights_of(module: nn.Module) -> list[Any]:
    """Return the weights that a visit to a module needs, its own and those it borrows, in DeepSpeed's order."""
    return sorted(set(iter_params(module)), key=attrgetter("ds_id"))


def prefetch_along_paths(coordinator: Any, layers: Stack) -> PathCoordinator:
    """Give the coordinator that DeepSpeed has built the behaviour of this file."""
    coordinator.__class__ = PathCoordinator
    coordinator.modules = {int(name): dict(block.named_modules()) for name, block in layers.items()}
    coordinator.recomputes = layers.recomputes
    coordinator.orders, coordinator.num_restarts = {}, 0
    coordinator._expected = coordinator._recorded = (tuple(coordinator.modules), True)
    coordinator._installed, coordinator._first_backward = None, None
    return coordinator
