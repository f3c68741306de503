"""The model's numbers, complete: what a run file may leave out has been derived."""

from dataclasses import dataclass, fields

from raptr_ds.config.sections import ModelSection


@dataclass(frozen=True)
class ModelSpec:
    """The values of raptr_ds.model that layers are built from; see ModelSection for what each means."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    seq_length: int
    vocab_size: int
    ffn_hidden_size: int
    activation: str
    normalization: str
    position_embedding: str
    rotary_base: float
    add_bias_linear: bool
    tie_word_embeddings: bool
    hidden_dropout: float
    attention_dropout: float
    init_method_std: float
    norm_epsilon: float

    @classmethod
    def of(cls, section: ModelSection) -> "ModelSpec":
        """Return the section's values, all of which must be known by now, the vocabulary's size too."""
        values = {field.name: getattr(section, field.name) for field in fields(cls)}
        unknown = [name for name, value in values.items() if value is None]
        assert not unknown, f"not derived: {unknown}"
        return cls(**values)
