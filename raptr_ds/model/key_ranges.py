"""What each position sees, as ranges: every attention mask of these models is one range of keys for each query."""

from typing import NamedTuple

import torch

from raptr_ds.data.batch import MicroBatch


class KeyRanges(NamedTuple):
    """Query q sees the keys first_key[q] <= k < end_key[q]; both bounds never decrease along the sequence.

    So key k is seen by the queries first_query[k] <= q < end_query[k]. Shapes: (b, T) int32 each.
    """

    first_key: torch.Tensor
    end_key: torch.Tensor
    first_query: torch.Tensor
    end_query: torch.Tensor


def key_ranges(batch: MicroBatch, is_causal: bool) -> KeyRanges | None:
    """Return what the positions of a batch see, None where each sees all.

    A position sees its example's prefix, itself and what lies before it; where the model is not causal the prefix is
    the whole example. No example sees padding; padding sees something, so that no row is empty.
    """
    if (bounds := _bounds(batch, is_causal)) is None:
        return None
    first, end = bounds
    shape = batch.tokens.shape
    first, end = first.expand(shape).contiguous(), end.expand(shape).contiguous()
    position = torch.arange(shape[1], device=end.device).expand(shape).contiguous()
    ranges = (
        first,
        end,
        torch.searchsorted(end, position, right=True),
        torch.searchsorted(first, position, right=True),
    )
    return KeyRanges(*(bound.to(torch.int32) for bound in ranges))


def dense_mask(batch: MicroBatch, is_causal: bool, dtype: torch.dtype) -> torch.Tensor | None:
    """Return the same as a mask to be added to scores: 0 where a key is seen and minus infinity where not.

    Shapes: (b, 1, T, T), or (b, 1, 1, T) where all positions see the same keys.
    """
    if (bounds := _bounds(batch, is_causal)) is None:
        return None
    first, end = bounds
    key = torch.arange(batch.tokens.shape[1], device=end.device)
    seen = ((key >= first[..., None]) & (key < end[..., None]))[:, None]
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)


def _bounds(batch: MicroBatch, is_causal: bool) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return first and end key of each position, (b, T) int64, or (b, 1) where they are the same for all."""
    position = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    if batch.segments is not None:
        start = position - batch.segments.positions
        lengths = torch.zeros_like(start).scatter_add_(1, start, batch.segments.in_prefix.long())
        return start, torch.maximum(position + 1, start + lengths.gather(1, start))
    start = torch.zeros_like(batch.lengths)[:, None]
    if is_causal:
        return start, torch.maximum(position + 1, batch.prefix_lengths[:, None])
    return None if batch.is_full else (start, batch.lengths[:, None])
