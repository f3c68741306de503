"""From token ids to the residual stream."""

import torch
from torch import nn

from raptr_ds.model.spec import ModelSpec
from raptr_ds.parallel.dropout import DropoutStreams, dropout
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.parallel.layers import vocab_embedding
from raptr_ds.parallel.sequence import sum_gradients

EMBEDDING_LAYER = -1  # the dropout streams' layer number for what lies before layer 0


class Embedding(nn.Module):
    """Word embedding split over the tensor ranks by vocabulary, and learned positions where the model has them.

    Where the head is tied to it and on the same stage, both use the weight that forward returns.
    """

    def __init__(self, model: ModelSpec, groups: ProcessGroups, compiled: bool = False) -> None:
        """compiled: dropout by torch.compile; what is around it is a few kernels anyway."""
        super().__init__()
        self.drop = torch.compile(dropout, dynamic=False) if compiled else dropout
        self.dropout_rate = model.hidden_dropout
        self.is_shared = model.tie_word_embeddings and groups.is_last_stage
        self.word = vocab_embedding(model.vocab_size, model.hidden_size, groups)
        learned = model.position_embedding == "learned"
        self.position = nn.Embedding(model.seq_length, model.hidden_size) if learned else None
        self.sequence_rank = groups.sequence_rank
        if self.position is not None:
            sum_gradients(self.position, groups)

    def forward(
        self, tokens: torch.Tensor, streams: DropoutStreams | None, positions: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Map (b, T) ids to (b, T, H), and return the weight (rows here, H) for a head that is tied to it.

        With sequence parallelism the stream is this rank's part of the sequences, (b, T / tensor, H).

        positions: (b, T), where they do not just count up (packed sequences).
        """
        x, weight = self.word.with_weight(tokens) if self.is_shared else (self.word(tokens), self.word.weight)
        first = self.sequence_rank * x.shape[1]
        if self.position is not None:
            if positions is None:
                positions = torch.arange(tokens.shape[1], device=tokens.device)
            x = x + self.position(positions[..., first : first + x.shape[1]])
        if streams is None or self.dropout_rate == 0.0:
            return x, weight
        masks = streams.of_layer(EMBEDDING_LAYER)
        return self.drop(x, self.dropout_rate, masks, "embedding", first_position=first), weight
