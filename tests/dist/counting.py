"""What a training step sends and computes, counted at torch's dispatcher: exact, and the same on a busy machine."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Counter(TorchDispatchMode):
    """Counts bytes handed to collectives, and elements that operators give while `inside` is true.

    summed_types: of the tensors of several elements that collectives sum over ranks.

    reads: how often a number is read from a tensor, for which the host would wait on a GPU.

    copied_elements: that ZeRO's passes through flat buffers give (cat, copy_, div_, lists too), inside or not.

    largest_bytes: by collective, the larger side of each call: what a reduce-scatter gets, an all-gather gives.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent_bytes = 0
        self.largest_bytes: dict[str, int] = {}
        self.summed_types: set[torch.dtype] = set()
        self.elements = 0
        self.copied_elements = 0
        self.reads = 0
        self.inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.sent_bytes += _num_bytes((args, kwargs))
            sides = [_num_bytes(side) for side in args]
            name = func.overloadpacket.__name__
            if name in {"allreduce_", "reduce_", "_reduce_scatter_base_", "reduce_scatter_"}:
                self.summed_types |= {tensor.dtype for tensor in _tensors(args) if tensor.numel() > 1}
            self.largest_bytes[name] = self.largest_bytes.get(name, 0) + max(sides, default=0)
            return func(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.reads += name in {"_local_scalar_dense", "is_nonzero"}
        if name in {"cat", "copy_", "div_"}:
            self.copied_elements += result.numel()
        elif name == "_foreach_copy_":
            self.copied_elements += sum(target.numel() for target in args[0])
        if self.inside and not getattr(func, "is_view", False):
            given = result if result is not None else args[0]  # in-place operators on lists return nothing
            self.elements += sum(tensor.numel() for tensor in _tensors(given))
        return result


def _num_bytes(value: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(value))


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


@contextmanager
def counting(optimizer: Any) -> Iterator[Counter]:
    """Count what happens in the block; elements only inside the optimizer's `step`."""
    counter = Counter()
    step = optimizer.step

    def counted(*args: Any, **more: Any) -> Any:
        counter.inside = True
        try:
            return step(*args, **more)
        finally:
            counter.inside = False

    optimizer.step = counted
    try:
        with counter:
            yield counter
    finally:
        del optimizer.step
