"""UL2: a decoder-only prefix language model; inputs are seen in both directions, targets causally."""

import torch

from raptr_ds.data.batch import MicroBatch
from raptr_ds.model.heads import Head
from raptr_ds.model.segments import same_segment
from raptr_ds.model.spec import ModelSpec
from raptr_ds.parallel.groups import ProcessGroups


def attention_mask(batch: MicroBatch) -> torch.Tensor:
    """Return what each position sees, bool (b, 1, T, T): the whole prefix, and itself and what lies before it.

    Padding stands after all real positions, so causality hides it from them. In packed sequences each example has its
    own prefix, and nothing is seen outside the example.
    """
    length = batch.tokens.shape[1]
    position = torch.arange(length, device=batch.tokens.device)
    causal = position[None, :] <= position[:, None]
    if batch.segments is not None:
        return same_segment(batch.segments) & (causal | batch.segments.in_prefix[:, None, None, :])
    prefix = position[None, :] < batch.prefix_lengths[:, None]
    return (causal[None] | prefix[:, None, :])[:, None]


def build_head(model: ModelSpec, groups: ProcessGroups) -> Head:
    """Return UL2's language-model head: final norm and projection."""
    return Head(model, groups, transform=False, output_bias=False)
