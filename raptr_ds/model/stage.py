"""The part of the model that one rank holds: embedding, layers, head; all of them where there is one stage."""

import torch
from torch import nn

from raptr_ds.config.sections import ModelSection
from raptr_ds.data.batch import MicroBatch
from raptr_ds.model.attention import rotary_table
from raptr_ds.model.compiler import let_integers_wrap
from raptr_ds.model.heads import Head
from raptr_ds.model.initialization import initialize
from raptr_ds.model.key_ranges import KeyRanges, dense_mask, key_ranges
from raptr_ds.model.stack import Stack
from raptr_ds.parallel.dropout import DropoutStreams, dropout
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.parallel.sequence import sum_gradients
from raptr_ds.parallel.word_embedding import WordEmbedding
from raptr_ds.paths.path import LayerPath

_MOST_GRAPHS = 64
EMBEDDING_LAYER = -1  # the dropout streams' layer number for what lies before layer 0


class Embedding(nn.Module):
    """Word embedding split over the tensor ranks by vocabulary, and learned positions where the model has them.

    Where the head is tied to it and on the same stage, both use the weight that forward returns.
    """

    def __init__(self, model: ModelSection, groups: ProcessGroups) -> None:
        super().__init__()
        self.drop = dropout
        self.dropout_rate = model.hidden_dropout
        self.is_shared = model.tie_word_embeddings and groups.is_last_stage
        self.word = WordEmbedding(model.vocab_size, model.hidden_size, groups)
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
        return self.drop(x, self.dropout_rate, masks, "embedding", first), weight


class Stage(nn.Module):
    """One pipeline stage of the model.

    Parameter names are canonical: the same in every layout, with global layer indices. Where the embedding is tied,
    the last of several stages holds a copy of it (`embedding.word.weight`, marked `tied_copy`).
    """

    def __init__(
        self, model: ModelSection, groups: ProcessGroups, layers: range, attention_kernel: bool = False
    ) -> None:
        super().__init__()
        self.model, self.attention_kernel = model, attention_kernel
        self.is_first, self.is_last = groups.is_first_stage, groups.is_last_stage
        self.embedding = None
        if self.is_first or (self.is_last and model.tie_word_embeddings):
            self.embedding = Embedding(model, groups)
        self.layers = Stack(model, groups, layers, attention_kernel)
        self.head = Head(model, groups) if self.is_last else None
        if self.embedding is not None and not self.is_first:
            self.embedding.position = None
            self.embedding.word.weight.tied_copy = True  # type: ignore[attr-defined]

    def forward(
        self, x: torch.Tensor, batch: MicroBatch, path: LayerPath, streams: DropoutStreams | None
    ) -> torch.Tensor:
        """Run this stage on a micro batch.

        Shapes: x is (b, T) token ids on the first stage and the (b, T, H) stream elsewhere; returns the stream, or on
        the last stage the losses of the predicted positions, (N,) fp32. With sequence parallelism the stream is this
        rank's part of the sequences, (b, T / tensor, H), between stages too.
        """
        positions = None if batch.segments is None else batch.segments.positions
        word_weight = None
        if self.is_first:
            assert self.embedding is not None
            x, word_weight = self.embedding(x, streams, positions)
        elif self.embedding is not None:
            word_weight = self.embedding.word.weight
        x = self.layers(x, path, *self.attention_inputs(batch, x), streams)
        if self.head is None:
            return x
        return self.head(x, batch.positions, batch.targets, word_weight)

    def compile_parts(self) -> None:
        """Compile each block when it first runs, and the embedding's dropout: what is around that is a few kernels."""
        # Each size of micro batch, with and without a residual scale, and evaluation have a graph of their own.
        torch._dynamo.config.recompile_limit = max(_MOST_GRAPHS, torch._dynamo.config.recompile_limit)
        let_integers_wrap()
        for block in self.layers.values():  # one graph of a size serves all: a block holds nothing else
            block.compile(dynamic=False)
        if self.embedding is not None:
            self.embedding.drop = torch.compile(dropout, dynamic=False)

    def attention_inputs(
        self, batch: MicroBatch, x: torch.Tensor
    ) -> tuple[torch.Tensor | KeyRanges | None, torch.Tensor | None]:
        """Return what every layer's attention gets besides the stream x: who sees whom, and the rotary table."""
        is_causal = self.model.architecture == "ul2"  # outside the prefix
        mask = key_ranges(batch, is_causal) if self.attention_kernel else dense_mask(batch, is_causal, x.dtype)
        rotary = None
        if self.model.position_embedding == "rotary":
            rotary = rotary_table(batch.tokens.shape[1], self.model.head_dim, self.model.rotary_base, x.device)
            if batch.segments is not None:
                rotary = rotary[:, batch.segments.positions][:, :, None]
        return mask, rotary


def build_stage(
    model: ModelSection,
    groups: ProcessGroups,
    layers: range,
    recompute: bool,
    seed: int,
    compiled: bool = False,
    keep_activations_up_to: int = 0,
    attention_kernel: bool = False,
) -> Stage:
    """Return this rank's stage with its initial weights, a pure function of (seed, parameter name).

    recompute: activations in the backward pass, on paths of more than keep_activations_up_to layers here.
    compiled: by torch.compile. attention_kernel: our own, for masks and dropout.
    """
    stage = Stage(model, groups, layers, attention_kernel)
    initialize(stage, model, seed)
    if recompute:
        stage.layers.keep_activations_up_to = keep_activations_up_to
    if compiled:
        stage.compile_parts()
    return stage
