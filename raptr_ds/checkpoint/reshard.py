"""Where a flat run of a padded shard lies in its full tensor: the arithmetic of loading into another layout.

A parameter is cut along one of its dims. Seen as a matrix with a row for each index before that dim, every shard is a
range of columns, and a run of a shard is at most three boxes: the end of a row, whole rows, the beginning of a row. So
data moves between any two ways of cutting a tensor as intersections of boxes, without a full tensor.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from raptr_ds.engine.fragments import Geometry


@dataclass(frozen=True)
class Window:
    """Elements of a run, from `first` to `end`, of which some are a matrix: its rows begin `stride` elements apart."""

    first: int
    end: int
    shape: tuple[int, int]
    stride: int

    def of(self, elements: torch.Tensor) -> torch.Tensor:
        """Return the matrix as a view of the run's elements from `first` to `end`."""
        return elements.as_strided(self.shape, (self.stride, 1))


@dataclass(frozen=True)
class Box:
    """Rows and columns of the full matrix that a run holds from its element `first` on, rows `stride` apart."""

    rows: range
    columns: range
    first: int
    stride: int

    def window(self, rows: range, columns: range) -> Window:
        """Return where some of the box's rows and columns lie in the run."""
        first = self.first + (rows.start - self.rows.start) * self.stride + columns.start - self.columns.start
        end = first + (len(rows) - 1) * self.stride + len(columns)
        return Window(first, end, (len(rows), len(columns)), self.stride)


@lru_cache(maxsize=1 << 16)  # many ranks' runs are compared with many entries, for each kind of state
def boxes_of(run: Geometry, dim: int) -> tuple[Box, ...]:
    """Return the boxes of a run in order, without padding; dim: along which the tensor's shards are cut."""
    inner = math.prod(run.full_shape[dim + 1 :])
    stride = run.local_shape[dim] * inner
    start, width = (0, stride) if run.dim is None else (run.start * inner, run.size * inner)
    boxes, at, end = [], run.offset, run.offset + run.numel
    while at < end:
        row, column = divmod(at, stride)
        num_rows = 1 if column else max(1, (end - at) // stride)
        stop = min(end, (row + num_rows) * stride)
        last = min(width, column + stop - at)
        if column < last:
            columns = range(start + column, start + last)
            boxes.append(Box(range(row, row + num_rows), columns, at - run.offset, stride))
        at = stop
    return tuple(boxes)


def transfers(source: Geometry, target: Geometry) -> list[tuple[Window, Window]]:
    """Return the boxes that two runs of the same full tensor have in common: where each lies in either."""
    dims = {run.dim for run in (source, target)} - {None}
    assert len(dims) <= 1, f"cut along different dims: {source}, {target}"
    dim = next(iter(dims), 0)
    found = []
    for theirs in boxes_of(source, dim):
        for ours in boxes_of(target, dim):
            rows, columns = _common(theirs.rows, ours.rows), _common(theirs.columns, ours.columns)
            if rows and columns:
                found.append((theirs.window(rows, columns), ours.window(rows, columns)))
    return found


def num_real_elements(run: Geometry) -> int:
    """Return how many elements of a run are not padding."""
    return sum(len(box.rows) * len(box.columns) for box in boxes_of(run, run.dim or 0))


def _common(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))
