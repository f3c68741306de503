"""ZeRO 3's prefetching along a path that changes with every step.

DeepSpeed records the order in which a step visits the modules and prefetches weights in this order; a step along
another path makes it discard the order and fetch each weight only when it is needed (runtime/zero/
partitioned_param_coordinator.py of deepspeed 0.19.8, trace_prologue). But a step's order consists of known pieces:

    before | layer 0, layer 3, layer 7 | head     forward
    after  | layer 0, layer 3, layer 7 | head     backward, read from right to left

Every layer visits modules of the same names, so one recorded step, along any path, gives the order along every path
(`Pass.learn`, `Pass.along`). `PathCoordinator` knows the path before each forward pass (`expect`), and at the first
module (`reset_step`) it installs the order along it as if DeepSpeed had recorded it; where the pieces are not known yet
DeepSpeed records the step. A step that recomputes activations visits a layer's modules in another order than one that
keeps them, so one step of each kind is recorded. If DeepSpeed meets a module that the order does not have, all is
discarded and recorded again.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from deepspeed.runtime.zero.partition_parameters import register_external_parameter
from deepspeed.runtime.zero.partitioned_param_coordinator import (
    PartitionedParameterCoordinator,
    ZeRoTraceMode,
    iter_params,
)
from torch import nn

from raptr_ds.engine.work_clock import WorkClock
from raptr_ds.model.stack import Stack

_PRIVATE = "_PartitionedParameterCoordinator__"

_Modules = dict[int, dict[str, nn.Module]]  # the modules of each layer by name


@dataclass(frozen=True)
class Pass:
    """The pieces of the order in which a forward or a backward pass visits modules.

    before, after: modules outside the layers. inside: names of the modules inside a layer, "" for the layer itself.
    """

    before: tuple[nn.Module, ...]
    inside: tuple[str, ...]
    after: tuple[nn.Module, ...]

    def along(self, layers: Sequence[int], modules: _Modules) -> list[nn.Module]:
        """Return the modules that a pass visits which goes through `layers` in this order."""
        return [*self.before, *(modules[layer][name] for layer in layers for name in self.inside), *self.after]

    @classmethod
    def learn(cls, visits: Sequence[nn.Module], layers: Sequence[int], modules: _Modules) -> "Pass | None":
        """Return the pieces of a recorded pass through `layers`; None if it does not consist of such pieces."""
        names = {module: name for inside in modules.values() for name, module in inside.items()}
        numbers = [number for number, module in enumerate(visits) if module in names]
        if not numbers or not layers:
            return None
        first, end = numbers[0], numbers[-1] + 1
        first_layer = visits[first : first + (end - first) // len(layers)]
        found = cls(tuple(visits[:first]), tuple(names[m] for m in first_layer if m in names), tuple(visits[end:]))
        return found if found.along(layers, modules) == list(visits) else None


class PathCoordinator(PartitionedParameterCoordinator):
    """DeepSpeed's coordinator, which learns the path of each forward pass before it begins.

    A path here is (its layers, whether backward passes follow). Made by `prefetch_along_paths`.
    """

    modules: _Modules
    recomputes: Callable[[int], bool]
    """Whether a training step along this number of layers recomputes their activations."""
    clock: WorkClock
    reads_in_parts: bool
    """Whether `read_in_parts` has been called."""
    orders: dict[bool, tuple[Pass, Pass]]
    """Both passes of steps that recompute (True) and of those that do not (False), as far as they are known."""
    _expected: tuple[tuple[int, ...], bool]
    """The path of the next forward passes."""
    _installed: tuple[tuple[int, ...], bool] | None
    """The path whose order DeepSpeed has from us; None if it has its own recorded order, or none."""
    _recorded: tuple[tuple[int, ...], bool]
    """The path of the last forward pass, which DeepSpeed has recorded if it was recording."""
    _first_backward: int | None
    """The number of the recorded step's first visit in the backward pass."""
    _uses: dict[nn.Parameter, list[int]]
    """The visits of the installed order that need a weight."""
    _numel_before: list[int]
    """The number of weights' elements that the visits before each visit of the installed order need."""

    def expect(self, layers: tuple[int, ...], training: bool) -> None:
        """Set the layers of the next forward passes, and whether backward passes follow them."""
        self._expected = (layers, training)

    def read_in_parts(self: Any) -> None:
        """Fetch the weights of which branches read rows and columns with the branch, as they visit no module for it.

        DeepSpeed finds such weights when they are read, one module at a time: a layer that a path first takes later on
        would then not be as the recorded one.
        """
        if self.reads_in_parts:
            return
        self.reads_in_parts, self._installed = True, None
        for inside in self.modules.values():
            for branch in inside.values():
                for child in branch.children():
                    weights = list(child.parameters(recurse=False))
                    if any(hasattr(weight, "parts") for weight in weights):
                        for weight in weights:
                            register_external_parameter(branch, weight)

    def reset_step(self: Any) -> None:
        """Begin a forward pass: DeepSpeed calls this before the model's first module."""
        if self.is_record_trace():
            self._learn(*self._recorded)
        layers, training = self._expected
        # Where no backward pass follows, the forward pass of either kind of step will do.
        order = self.orders.get(self.recomputes(len(layers))) if training else next(iter(self.orders.values()), None)
        if order is None:
            self._record_anew()
        elif self._installed != self._expected:
            visits = order[0].along(layers, self.modules)
            self._install(visits + order[1].along(layers[::-1], self.modules) if training else visits)
        super().reset_step()
        self._recorded, self._first_backward = self._expected, None

    def _learn(self: Any, layers: tuple[int, ...], training: bool) -> None:
        """Learn the pieces from what was recorded, if that was a whole training step."""
        if training and self._first_backward is not None:
            visits = self._get("submodule_order")
            forward = Pass.learn(visits[: self._first_backward], layers, self.modules)
            backward = Pass.learn(visits[self._first_backward :], layers[::-1], self.modules)
            if forward is not None and backward is not None:
                self.orders[self.recomputes(len(layers))] = forward, backward

    def _record_anew(self: Any) -> None:
        """Make DeepSpeed record the next step if the order that it has is ours, or that of the other kind of step."""
        (had, had_training), (layers, training) = self._recorded, self._expected
        is_other = training and had_training and self.recomputes(len(had)) != self.recomputes(len(layers))
        if (is_other or self._installed is not None) and not self.is_invalid_trace():
            super()._invalidate_trace()
        self._installed = None

    def fetch_sub_module(self: Any, current_submodule: nn.Module, forward: bool) -> None:
        """Fetch as DeepSpeed does, and note where the backward pass of a recorded step begins."""
        if not forward and self._first_backward is None and self.is_record_trace():
            self._first_backward = len(self._get("submodule_order")) - 1
        with self.clock.waiting():
            super().fetch_sub_module(current_submodule, forward)

    def _invalidate_trace(self: Any) -> None:
        """Discard all orders: DeepSpeed has met a module that it did not expect, and will record again."""
        self.orders.clear()
        self._installed = None
        super()._invalidate_trace()

    def _install(self: Any, order: list[nn.Module]) -> None:
        """Install the order of the expected path as if DeepSpeed had recorded it."""
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
        self._installed = self._expected

    def _PartitionedParameterCoordinator__params_to_release(  # noqa: N802 - DeepSpeed's private name
        self: Any, module: nn.Module, visit: int
    ) -> set[int]:
        """Return the ids of a module's weights that are not needed again within the next max_reuse_distance elements.

        DeepSpeed's own function scans the rest of the order and caches the result by the visit's number. If the order
        changes with each step the scan costs as much as a small step.
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
    """Return the weights that a visit to a module needs, its own and shared ones, in DeepSpeed's order."""
    return sorted(set(iter_params(module)), key=attrgetter("ds_id"))


def prefetch_along_paths(coordinator: Any, layers: Stack, clock: WorkClock) -> PathCoordinator:
    """Turn the coordinator that DeepSpeed has built into a PathCoordinator.

    DeepSpeed's offload code names the class that it builds, so a subclass can only be set afterwards.
    """
    coordinator.__class__ = PathCoordinator
    coordinator.modules = {int(name): dict(block.named_modules()) for name, block in layers.items()}
    coordinator.recomputes, coordinator.clock = layers.recomputes, clock
    coordinator.orders, coordinator.reads_in_parts = {}, False
    coordinator._expected = coordinator._recorded = (tuple(coordinator.modules), True)
    coordinator._installed, coordinator._first_backward = None, None
    return coordinator
