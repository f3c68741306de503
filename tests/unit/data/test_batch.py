"""A micro batch travels to a GPU in one buffer and comes out of it as it was."""

import torch
from torch.utils._pytree import tree_leaves

from raptr_ds.data.batch import ALIGNMENT, MicroBatch, Segments, StepBatch, packed, unpacked


def micro_batch(rows: int, is_packed: bool) -> MicroBatch:
    tokens = torch.arange(rows * 7).view(rows, 7)
    segments = Segments(tokens % 3, tokens % 5, tokens % 2 == 0) if is_packed else None
    numbers = torch.arange(rows)
    return MicroBatch(
        tokens, torch.arange(3), torch.arange(3) + 9, numbers, numbers + 1, numbers + 2, is_full=True, segments=segments
    )


def test_what_is_packed_comes_out_as_it_was() -> None:
    batch = StepBatch((micro_batch(1, False), micro_batch(3, True)))
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
    assert len(tensors) == 6 + 9
    views = unpacked(packed(tensors, pin_memory=False), tensors)
    for view, tensor in zip(views, tensors, strict=True):
        assert view.dtype == tensor.dtype
        assert torch.equal(view, tensor)
        assert view.storage_offset() * view.element_size() % ALIGNMENT == 0


def test_a_batch_without_predictions_is_packed_too() -> None:
    empty = [torch.zeros(0, dtype=torch.int64), torch.ones(2, dtype=torch.bool), torch.zeros(0, dtype=torch.bool)]
    for view, tensor in zip(unpacked(packed(empty, pin_memory=False), empty), empty, strict=True):
        assert torch.equal(view, tensor)


def test_moving_keeps_everything_in_its_place() -> None:
    micro = micro_batch(2, True)
    moved = StepBatch((micro, micro_batch(1, False))).to(torch.device("cpu")).micro_batches
    assert moved[1].segments is None
    assert moved[0].is_full
    for before, after in zip(tree_leaves(micro), tree_leaves(moved[0]), strict=True):
        assert torch.equal(before, after) if isinstance(before, torch.Tensor) else before == after
