"""Where a flat run of a padded shard lies in its full tensor: the arithmetic of loading into another layout.

A run of a flattened tensor of d dims consists of at most 2d - 1 blocks, each contiguous in the run and a box in the
tensor. So data moves between any two ways of cutting a tensor as intersections of boxes, without a full tensor.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from raptr_ds.engine.fragments import Geometry


@dataclass(frozen=True)
class Block:
    """A contiguous part of a run that is a box of the full tensor.

    first: its first element in the run. corner, shape: the box in the full tensor, including padding. real: its size
    along each dim without padding.
    """

    first: int
    corner: tuple[int, ...]
    shape: tuple[int, ...]
    real: tuple[int, ...]


@dataclass(frozen=True)
class Window:
    """A box in a run: its elements from `first` to `end`, viewed as `shape` and narrowed to `ranges`, (start, size)."""

    first: int
    shape: tuple[int, ...]
    ranges: tuple[tuple[int, int], ...]

    @property
    def end(self) -> int:
        """The element behind the last that is viewed."""
        return self.first + math.prod(self.shape)

    def of(self, elements: torch.Tensor) -> torch.Tensor:
        """Return the box as a view of the run's elements from `first` to `end`."""
        box = elements.view(self.shape)
        for dim, (start, size) in enumerate(self.ranges):
            box = box.narrow(dim, start, size)
        return box


@lru_cache(maxsize=1 << 16)  # many ranks' runs are compared with many entries, for each kind of state
def blocks_of(run: Geometry) -> tuple[Block, ...]:
    """Return the blocks of a run in order, without those that are all padding."""
    blocks, first = [], 0
    for corner, shape in _boxes(run.local_shape, run.offset, run.offset + run.numel):
        numel = math.prod(shape)
        if run.dim is None:
            blocks.append(Block(first, corner, shape, shape))
        else:
            left = min(shape[run.dim], run.size - corner[run.dim])
            if left > 0:
                real = _replaced(shape, run.dim, left)
                blocks.append(Block(first, _replaced(corner, run.dim, corner[run.dim] + run.start), shape, real))
        first += numel
    return tuple(blocks)


def transfers(source: Geometry, target: Geometry) -> list[tuple[Window, Window]]:
    """Return the boxes that two runs of the same full tensor have in common: where each lies in either."""
    pairs = (_transfer(theirs, ours) for ours in blocks_of(target) for theirs in blocks_of(source))
    return [pair for pair in pairs if pair is not None]


def num_real_elements(run: Geometry) -> int:
    """Return how many elements of a run are not padding."""
    return sum(math.prod(block.real) for block in blocks_of(run))


def _transfer(source: Block, target: Block) -> tuple[Window, Window] | None:
    low = tuple(max(a, b) for a, b in zip(source.corner, target.corner, strict=True))
    high = tuple(
        min(a + m, b + n) for a, m, b, n in zip(source.corner, source.real, target.corner, target.real, strict=True)
    )
    sizes = [b - a for a, b in zip(low, high, strict=True)]
    if min(sizes, default=1) <= 0:
        return None
    read_window = [(a - corner, size) for a, corner, size in zip(low, source.corner, sizes, strict=True)]
    write_window = [(a - corner, size) for a, corner, size in zip(low, target.corner, sizes, strict=True)]
    # Read only the window's part along the block's first dim whose size is not 1.
    read_first, read_shape = source.first, list(source.shape)
    for dim, length in enumerate(source.shape):
        if length > 1:
            start, size = read_window[dim]
            read_first += start * math.prod(source.shape[dim + 1 :])
            read_shape[dim], read_window[dim] = size, (0, size)
            break
    read = Window(read_first, tuple(read_shape), tuple(read_window))
    return read, Window(target.first, target.shape, tuple(write_window))


def _boxes(shape: tuple[int, ...], begin: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield (corner, shape) of the boxes that elements begin..end of a flattened tensor consist of, in order."""
    if begin >= end:
        return
    if not shape:
        yield (), ()
        return
    inner, rest = math.prod(shape[1:]), shape[1:]
    first, skipped = divmod(begin, inner)
    last, tail = divmod(end, inner)
    if first == last:
        yield from _in_row(first, rest, skipped, tail)
        return
    if skipped:
        yield from _in_row(first, rest, skipped, inner)
        first += 1
    if first < last:
        yield (first,) + (0,) * len(rest), (last - first, *rest)
    yield from _in_row(last, rest, 0, tail)


def _in_row(row: int, rest: tuple[int, ...], begin: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for corner, shape in _boxes(rest, begin, end):
        yield (row, *corner), (1, *shape)


def _replaced(values: tuple[int, ...], position: int, value: int) -> tuple[int, ...]:
    return (*values[:position], value, *values[position + 1 :])
