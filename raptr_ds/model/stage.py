"""The part of the model that one rank holds: embedding, layers, head; all of them where there is one stage."""

import torch
from torch import nn

from raptr_ds.config.sections import ModelSection
from raptr_ds.data.batch import MicroBatch
from raptr_ds.model import bert, ul2
from raptr_ds.model.attention import rotary_table
from raptr_ds.model.embedding import Embedding
from raptr_ds.model.initialization import initialize
from raptr_ds.model.key_ranges import dense_mask, key_ranges
from raptr_ds.model.spec import ModelSpec
from raptr_ds.model.stack import Stack
from raptr_ds.parallel.dropout import DropoutStreams
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.paths.path import LayerPath

_ARCHITECTURES = {"bert": bert, "ul2": ul2}


class Stage(nn.Module):
    """One pipeline stage of the model.

    Parameter names are canonical: the same in every layout, with global layer indices. Where the embedding is tied,
    the last of several stages holds a copy of it (`embedding.word.weight`, marked `tied_copy`).
    """

    def __init__(
        self,
        model: ModelSpec,
        groups: ProcessGroups,
        layers: range,
        recompute: bool = False,
        compiled: bool = False,
        keep_activations_up_to: int = 0,
        attention_kernel: bool = False,
    ) -> None:
        super().__init__()
        self.attention_kernel = attention_kernel
        self.model = model
        self.architecture = _ARCHITECTURES[model.architecture]
        self.is_first, self.is_last = groups.is_first_stage, groups.is_last_stage
        self.embedding = None
        if self.is_first or (self.is_last and model.tie_word_embeddings):
            self.embedding = Embedding(model, groups, compiled)
        self.layers = Stack(model, groups, layers, recompute, compiled, keep_activations_up_to, attention_kernel)
        self.head = self.architecture.build_head(model, groups) if self.is_last else None
        if self.embedding is not None and not self.is_first:
            self.embedding.position = None
            self.embedding.word.weight.tied_copy = True  # type: ignore[attr-defined]
            # DeepSpeed's name for the same thing (runtime/zero/stage_1_and_2.py, get_grad_norm_direct).
            self.embedding.word.weight.ds_pipe_replicated = True  # type: ignore[attr-defined]

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
        is_causal = self.architecture.IS_CAUSAL
        mask = key_ranges(batch, is_causal) if self.attention_kernel else dense_mask(batch, is_causal, x.dtype)
        rotary = None
        if self.model.position_embedding == "rotary":
            head_dim = self.model.hidden_size // self.model.num_attention_heads
            rotary = rotary_table(batch.tokens.shape[1], head_dim, self.model.rotary_base, x.device)
            if positions is not None:
                rotary = rotary[:, positions][:, :, None]
        x = self.layers(x, path, mask, rotary, streams)
        if self.head is None:
            return x
        return self.head(x, batch.positions, batch.targets, word_weight)


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
    compiled: by torch.compile, each block when it first runs. attention_kernel: our own, for masks and dropout.
    """
    spec = ModelSpec.of(model)
    stage = Stage(spec, groups, layers, recompute, compiled, keep_activations_up_to, attention_kernel)
    initialize(stage, spec, seed)
    return stage
