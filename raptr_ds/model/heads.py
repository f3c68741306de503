"""From the residual stream to the loss of the predicted positions; nothing is computed at the other positions."""

import torch
from torch import nn
from torch.nn import functional

from raptr_ds.config.sections import ModelSection
from raptr_ds.model.block import build_norm
from raptr_ds.parallel.cross_entropy import cross_entropy
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.parallel.sequence import pick_positions
from raptr_ds.parallel.word_embedding import WordEmbedding, vocab_bias


class Head(nn.Module):
    """Final norm, BERT's transform (dense, gelu, norm), and the projection on the vocabulary, with a bias for BERT.

    The projection's weight is the word embedding's where they are tied, `self.output` where not.
    """

    def __init__(self, model: ModelSection, groups: ProcessGroups) -> None:
        super().__init__()
        hidden, vocab_size, is_bert = model.hidden_size, model.vocab_size, model.architecture == "bert"
        self.vocab_size, self.groups = vocab_size, groups
        self.norm = build_norm(model)
        self.transform = nn.Linear(hidden, hidden) if is_bert else None
        self.transform_norm = build_norm(model) if is_bert else None
        self.output = None if model.tie_word_embeddings else WordEmbedding(vocab_size, hidden, groups)
        self.bias = vocab_bias(vocab_size, groups) if is_bert else None

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor, tied_weight: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the losses of the predicted positions, fp32.

        Shapes: x (b, T, H), or this rank's part of the sequences; positions (N,) flat indices into b * T; targets
        (N,); returns (N,).
        """
        x, weight = self._before_output(x, positions, tied_weight)
        return cross_entropy(x, weight, self.bias, targets, vocab_size=self.vocab_size, groups=self.groups)

    def logits(self, x: torch.Tensor, positions: torch.Tensor, tied_weight: torch.Tensor | None) -> torch.Tensor:
        """Return the logits at some positions, where no rank shares the vocabulary. Shapes: as in forward; (N, V)."""
        assert self.groups.topology.tensor == 1, self.groups.topology
        x, weight = self._before_output(x, positions, tied_weight)
        return functional.linear(x, weight, self.bias)[:, : self.vocab_size]

    def _before_output(
        self, x: torch.Tensor, positions: torch.Tensor, tied_weight: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.norm(pick_positions(x, positions, self.groups))
        if self.transform is not None and self.transform_norm is not None:
            x = self.transform_norm(functional.gelu(self.transform(x)))
        weight = tied_weight if self.output is None else self.output.weight
        assert weight is not None
        return x, weight
