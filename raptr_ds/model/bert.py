"""BERT: a bidirectional encoder with a masked-language-model head, pre-norm as Megatron's BERT."""

import torch

from raptr_ds.data.batch import MicroBatch
from raptr_ds.model.heads import Head
from raptr_ds.model.segments import same_segment
from raptr_ds.model.spec import ModelSpec
from raptr_ds.parallel.groups import ProcessGroups


def attention_mask(batch: MicroBatch) -> torch.Tensor | None:
    """Return which keys are seen, bool (b, 1, 1, T): all real positions; None where nothing is padded.

    Packed sequences: bool (b, 1, T, T), the positions of the same example.
    """
    if batch.segments is not None:
        return same_segment(batch.segments)
    length = batch.tokens.shape[1]
    if batch.is_full:
        return None
    return (torch.arange(length, device=batch.tokens.device) < batch.lengths[:, None])[:, None, None, :]


def build_head(model: ModelSpec, groups: ProcessGroups) -> Head:
    """Return BERT's masked-language-model head: transform, norm, tied projection with a bias."""
    return Head(model, groups, transform=True, output_bias=True)
