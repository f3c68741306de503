"""Boxes and transfers against the obvious oracle: whole tensors, cut, padded, flattened and put together again."""

import itertools
import math

import numpy as np
import pytest
import torch

from raptr_ds.checkpoint.reshard import boxes_of, num_real_elements, transfers
from raptr_ds.engine.fragments import Geometry

PADDING = -1


def local_of(full: np.ndarray, run: Geometry) -> np.ndarray:
    """Return the run's elements of a full tensor, padding as PADDING."""
    local = full
    if run.dim is not None:
        local = np.full(run.local_shape, PADDING, full.dtype)
        window = [slice(None)] * full.ndim
        window[run.dim] = slice(0, run.size)
        local[tuple(window)] = full.take(range(run.start, run.start + run.size), axis=run.dim)
    return local.reshape(-1)[run.offset : run.offset + run.numel]


def layout(shape: tuple[int, ...], dim: int | None, ranks: int, cuts: list[int]) -> list[Geometry]:
    """Return all runs of a tensor split over `ranks` along `dim` (padded where need be), each cut at fractions."""
    runs = []
    length = -(-shape[dim] // ranks) if dim is not None else 0
    for rank in range(ranks if dim is not None else 1):
        local, start, size = shape, 0, 0
        if dim is not None:
            local = (*shape[:dim], length, *shape[dim + 1 :])
            start = min(rank * length, shape[dim])
            size = min(length, shape[dim] - start)
        numel = math.prod(local)
        bounds = sorted({0, numel, *(cut % (numel + 1) for cut in cuts)})
        runs += [Geometry(shape, dim, start, size, local, a, b - a) for a, b in itertools.pairwise(bounds)]
    return runs


def random_layout(rng: np.random.Generator, shape: tuple[int, ...], dim: int) -> list[Geometry]:
    """Return a layout that cuts a tensor along `dim`, or, one in three, not at all."""
    cuts = rng.integers(0, math.prod(shape) + 1, rng.integers(0, 5)).tolist()
    return layout(shape, None if rng.integers(3) == 0 else dim, int(rng.integers(2, 5)), cuts)


@pytest.mark.parametrize("seed", range(150))
def test_any_layout_goes_to_any_other_element_by_element(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 8, rng.integers(1, 4)).tolist())
    full = np.arange(math.prod(shape)).reshape(shape)
    dim = int(rng.integers(len(shape)))
    sources, targets = random_layout(rng, shape, dim), random_layout(rng, shape, dim)
    for target in targets:
        found = torch.full((target.numel,), PADDING)
        copied = 0
        for source in sources:
            data = torch.from_numpy(local_of(full, source))
            for read, write in transfers(source, target):
                box = read.of(data[read.first : read.end])
                write.of(found[write.first : write.end]).copy_(box)
                copied += box.numel()
        expected = local_of(full, target)
        np.testing.assert_array_equal(found.numpy(), expected)
        assert copied == num_real_elements(target) == (expected != PADDING).sum()


def test_a_run_is_at_most_three_boxes() -> None:
    shape = (4, 5, 6)
    for begin in range(120):
        for end in range(begin + 1, 121):
            whole = Geometry(shape, None, 0, 0, shape, begin, end - begin)
            for dim in range(3):
                boxes = boxes_of(whole, dim)
                assert 1 <= len(boxes) <= 3
                assert sum(len(box.rows) * len(box.columns) for box in boxes) == end - begin


def test_rows_are_read_without_their_neighbours() -> None:
    whole = Geometry((100, 8), None, 0, 0, (100, 8), 0, 800)
    rows = Geometry((100, 8), 0, 50, 25, (25, 8), 0, 200)
    [(read, _)] = transfers(whole, rows)
    assert (read.first, read.end) == (400, 600)


def test_padding_alone_is_nothing() -> None:
    beyond = Geometry((5,), 0, 5, 0, (2,), 0, 2)
    assert boxes_of(beyond, 0) == ()
    assert num_real_elements(Geometry((5, 3), 0, 4, 1, (2, 3), 0, 6)) == 3


def test_an_empty_run_is_nothing() -> None:
    assert boxes_of(Geometry((3, 2), None, 0, 0, (3, 2), 4, 0), 0) == ()
