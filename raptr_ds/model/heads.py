"""From the residual stream to the loss of the predicted positions; nothing is computed at the other positions."""

import torch
from torch import nn
from torch.nn import functional

from raptr_ds.model.norm import build_norm
from raptr_ds.model.spec import ModelSpec
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.parallel.layers import vocab_bias, vocab_cross_entropy, vocab_embedding
from raptr_ds.parallel.sequence import pick_positions


class Head(nn.Module):
    """Final norm, an optional transform (BERT's), and the projection on the vocabulary.

    The projection's weight is the word embedding's where they are tied, `self.output` where not.
    """

    def __init__(self, model: ModelSpec, groups: ProcessGroups, transform: bool, output_bias: bool) -> None:
        super().__init__()
        hidden, vocab_size = model.hidden_size, model.vocab_size
        self.vocab_size, self.groups = vocab_size, groups
        self.norm = build_norm(model.normalization, hidden, model.norm_epsilon)
        self.transform = nn.Linear(hidden, hidden) if transform else None
        self.transform_norm = build_norm(model.normalization, hidden, model.norm_epsilon) if transform else None
        self.output = None if model.tie_word_embeddings else vocab_embedding(vocab_size, hidden, groups)
        self.bias = vocab_bias(vocab_size, groups) if output_bias else None

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor, tied_weight: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the losses of the predicted positions, fp32.

        Shapes: x (b, T, H), or this rank's part of the sequences; positions (N,) flat indices into b * T; targets
        (N,); returns (N,).
        """
        x = self.norm(pick_positions(x, positions, self.groups))
        if self.transform is not None and self.transform_norm is not None:
            x = self.transform_norm(functional.gelu(self.transform(x)))
        weight = tied_weight if self.output is None else self.output.weight
        assert weight is not None
        return vocab_cross_entropy(x, weight, self.bias, targets, vocab_size=self.vocab_size, groups=self.groups)
