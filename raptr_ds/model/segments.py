"""Packed sequences in the model: what belongs to the same example."""

import torch

from raptr_ds.data.batch import Segments


def same_segment(segments: Segments) -> torch.Tensor:
    """Return which positions share an example, bool (b, 1, T, T); padding sees padding, so that no row is empty."""
    return (segments.ids[:, :, None] == segments.ids[:, None, :])[:, None]
