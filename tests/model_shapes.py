"""Models by their sizes alone, for tests of what a model costs."""

from typing import Literal

from raptr_ds.config.sections import ModelSection


def model_shape(
    architecture: Literal["bert", "ul2"],
    *,
    layers: int,
    hidden: int,
    length: int,
    vocabulary: int,
    ffn: int,
    heads: int = 2,
) -> ModelSection:
    """Return a model of these sizes; all else follows from the architecture."""
    return ModelSection(
        architecture=architecture,
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        seq_length=length,
        vocab_size=vocabulary,
        ffn_hidden_size=ffn,
    )
