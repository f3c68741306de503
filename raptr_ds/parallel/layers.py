"""Megatron-core's tensor-parallel layers as the model uses them, and which part of a parameter a rank holds."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from raptr_ds.parallel.column_product import column_product, reads_rows_apart
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.parallel.megatron_core import ColumnParallelLinear, ModelParallelConfig, RowParallelLinear
from raptr_ds.parallel.sequence import sum_over_ranks
from raptr_ds.parallel.uncompiled import outside_graphs


@dataclass(frozen=True)
class TensorShard:
    """The slice `start:start + size` along `dim` of a parameter of shape `full_shape` that this rank holds.

    The local tensor may be longer than `size` along `dim`: the rest is padding (a vocabulary that the tensor ranks
    do not divide). A replicated parameter has dim None.
    """

    full_shape: tuple[int, ...]
    dim: int | None = None
    start: int = 0
    size: int = 0

    def of_full(self, full: torch.Tensor, local_shape: torch.Size) -> torch.Tensor:
        """Return this shard of a full tensor, zero-padded to `local_shape`."""
        if self.dim is None:
            return full
        part = full.narrow(self.dim, self.start, self.size)
        following_dims = full.ndim - 1 - self.dim  # torch takes padding from the last dim on
        return functional.pad(part, [0, 0] * following_dims + [0, local_shape[self.dim] - self.size])


def mark_parts(parameter: nn.Parameter | None, kind: str, dim: int) -> None:
    """Say that `dim` of a parameter consists of as many equal pieces as a layer has parts of a kind, `Parts`' field."""
    if parameter is not None:
        parameter.parts = (kind, dim)  # type: ignore[attr-defined]


def pieces(numbers: torch.Tensor, size: int) -> torch.Tensor:
    """Return the indices of the elements of equal pieces, of which piece n begins at n * size: (n,) to (n * size,)."""
    return (numbers[:, None] * size + torch.arange(size, device=numbers.device)).flatten()


def shard_of(parameter: nn.Parameter) -> TensorShard:
    """Return which part of the full parameter this rank holds; a parameter that nobody marked is replicated.

    The answer is kept on the parameter: ZeRO 3 later empties it, and its shape with it.
    """
    shard = getattr(parameter, "shard", None)
    if shard is None:
        shard = TensorShard(tuple(parameter.shape))
        parameter.shard = shard  # type: ignore[attr-defined]
    return shard


def is_owner(parameter: nn.Parameter, groups: ProcessGroups) -> bool:
    """Whether this rank's copy counts in sums over the model: each element has one owner on the tensor x pipeline mesh.

    Sharded parameters count on every tensor rank, replicated ones on the first, a tied copy (the last pipeline
    stage's embedding) on none.
    """
    if getattr(parameter, "tied_copy", False):
        return False
    return shard_of(parameter).dim is not None or groups.tensor_rank == 0


def megatron_arguments(groups: ProcessGroups) -> dict[str, Any]:
    """Return what all of megatron-core's layers get. They draw no weights, so init_method is never called: weights are
    drawn by name later (model/initialization.py), so that no layout changes them."""
    config = ModelParallelConfig(
        tensor_model_parallel_size=groups.topology.tensor, use_cpu_initialization=True, perform_initialization=False
    )
    return {"config": config, "init_method": nn.init.zeros_, "tp_group": groups.tensor}


def mark_shard(parameter: nn.Parameter, dim: int, full: int, groups: ProcessGroups) -> None:
    """Say that the tensor ranks hold equal parts of a parameter, `full` elements along `dim` without padding."""
    if groups.topology.tensor == 1:
        return
    shape = list(parameter.shape)
    start = min(groups.tensor_rank * shape[dim], full)
    size, shape[dim] = min(shape[dim], full - start), full
    parameter.shard = TensorShard(tuple(shape), dim, start, size)  # type: ignore[attr-defined]


class ColumnLinear(ColumnParallelLinear):
    """A linear whose outputs are split over the tensor ranks; forward: (b, T, in) -> (b, T, out / tensor).

    With sequence parallelism x is this rank's part of the sequences, (b, T / tensor, in); outputs are of whole ones.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, groups: ProcessGroups) -> None:
        super().__init__(in_features, out_features, bias=bias, gather_output=False, **megatron_arguments(groups))
        self.is_split, self.is_along_sequence = groups.topology.tensor > 1, groups.sequence_parallel
        self.group = groups.tensor
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                mark_shard(parameter, 0, out_features, groups)

    def forward(self, x: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return this rank's outputs (megatron-core returns a pair, its second part for deferred biases)."""
        assert self.weight is not None
        return self._outputs(x, self.weight, self.bias)

    def of_rows(self, x: torch.Tensor, rows: torch.Tensor | None) -> Any:
        """Return those of this rank's outputs that `rows` (n,) int64 names, (..., n), and compute no others; None: all.

        Some are computed without visiting the module: see PathCoordinator.read_in_parts for ZeRO 3.
        """
        if rows is None:
            return self(x)
        assert self.weight is not None
        bias = None if self.bias is None else self.bias.index_select(0, rows)
        return self._outputs(x, self.weight.index_select(0, rows), bias)

    def _outputs(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        if not self.is_split:
            return functional.linear(x, weight, bias)
        (y,) = self._products(x, weight, 1)
        return y if bias is None else y + bias

    @outside_graphs  # it waits for other ranks
    def _products(self, x: torch.Tensor, weight: torch.Tensor, num_parts: int) -> tuple[torch.Tensor, ...]:
        return column_product(x, weight, num_parts, self.group, self.is_along_sequence)


class GatedColumnLinear(ColumnLinear):
    """A column linear with rows 2i and 2i + 1 for gate and value of inner feature i, which it returns apart.

    forward: (b, T, in) -> two (b, T, out / 2 / tensor). In that order a feature's two rows are on one rank whatever the
    tensor size; of_rows takes pairs of them.
    """

    def _outputs(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not reads_rows_apart(x.device):
            gate, value = super()._outputs(x, weight, bias).unflatten(-1, (-1, 2)).unbind(-1)
            return gate, value
        gate, value = self._products(x, weight, 2) if self.is_split else column_product(x, weight, 2)
        if bias is not None:
            gate, value = gate + bias[0::2], value + bias[1::2]
        return gate, value


class RowLinear(RowParallelLinear):
    """A linear whose inputs are split over the tensor ranks; forward: (b, T, in / tensor) -> (b, T, out).

    With sequence parallelism outputs are this rank's part of the sequences, (b, T / tensor, out).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, groups: ProcessGroups) -> None:
        super().__init__(
            in_features,
            out_features,
            bias=bias,
            input_is_parallel=True,
            skip_bias_add=False,
            **megatron_arguments(groups),
        )
        self.is_split, self.is_along_sequence = groups.topology.tensor > 1, groups.sequence_parallel
        self.group = groups.tensor
        mark_shard(self.weight, 1, in_features, groups)  # the bias is replicated and stays unmarked

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the summed outputs, the same on every tensor rank, or its part of them."""
        if not self.is_split:
            return functional.linear(x, self.weight, self.bias)
        return self._sum(functional.linear(x, self.weight), self.bias)

    def of_columns(self, x: torch.Tensor, columns: torch.Tensor | None) -> torch.Tensor:
        """Return the summed outputs for inputs (..., n) at the positions `columns` (n,) int64; None: all.

        The other inputs are 0.
        """
        if columns is None:
            return self(x)
        # Not functional.linear: at ZeRO 3 DeepSpeed puts one in its place that fails where a rank has no columns.
        y = x @ self.weight.index_select(1, columns).t()
        if self.is_split:
            return self._sum(y, self.bias)
        return y if self.bias is None else y + self.bias

    @outside_graphs  # it waits for other ranks
    def _sum(self, y: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return sum_over_ranks(y, bias, self.group, self.is_along_sequence)
