"""UL2: a decoder-only prefix language model; inputs are seen in both directions, targets causally."""

from raptr_ds.model.heads import Head
from raptr_ds.model.spec import ModelSpec
from raptr_ds.parallel.groups import ProcessGroups

IS_CAUSAL = True
"""Whether positions outside the prefix see only what lies before them."""


def build_head(model: ModelSpec, groups: ProcessGroups) -> Head:
    """Return UL2's language-model head: final norm and projection."""
    return Head(model, groups, transform=False, output_bias=False)
