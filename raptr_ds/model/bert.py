"""BERT: a bidirectional encoder with a masked-language-model head, pre-norm as Megatron's BERT."""

from raptr_ds.model.heads import Head
from raptr_ds.model.spec import ModelSpec
from raptr_ds.parallel.groups import ProcessGroups

IS_CAUSAL = False
"""Whether positions outside the prefix see only what lies before them."""


def build_head(model: ModelSpec, groups: ProcessGroups) -> Head:
    """Return BERT's masked-language-model head: transform, norm, tied projection with a bias."""
    return Head(model, groups, transform=True, output_bias=True)
