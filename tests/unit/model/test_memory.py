"""The activation formula against what torch keeps for the backward pass of the real model."""

import dataclasses

import numpy as np
import pytest
import torch

from raptr_ds.config.derive import derive_model
from raptr_ds.config.sections import ModelSection
from raptr_ds.data.batch import collate
from raptr_ds.data.sample import Sample
from raptr_ds.model.stage import build_stage
from raptr_ds.paths import Path
from raptr_ds.paths.cost import ModelShape
from raptr_ds.paths.memory import TrainingState, activation_bytes, layer_activation_bytes
from raptr_ds.paths.step_time import Layout
from tests.dropout_masks import streams_of

# Longer than what attention on a CPU computes in fp32 in place of 16 bits, which the formula leaves out.
LENGTH, VOCAB, BATCH, LAYERS = 160, 3000, 2, 5


def kept_bytes(stage, micro, path_length, streams):
    """Return the bytes of all storages that autograd saves, parameters aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in stage.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor  # alive, so that no other storage gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = stage(micro.tokens, micro, Path(tuple(range(path_length)), LAYERS), streams)
    assert losses.grad_fn.exponentials.shape == (9 * BATCH, VOCAB)  # the cross-entropy's own, which no hook sees
    kept_by_head = losses.grad_fn.exponentials.untyped_storage().nbytes()
    return kept_by_head + sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("architecture", ["bert", "ul2"])
@pytest.mark.parametrize("dropouts", [(0.0, 0.0), (0.1, 0.1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_what_autograd_keeps(groups, architecture, dropouts, dtype, recompute):
    model = derive_model(
        ModelSection(
            architecture=architecture,
            num_layers=LAYERS,
            hidden_size=128,
            num_attention_heads=4,
            seq_length=LENGTH,
            vocab_size=VOCAB,
            hidden_dropout=dropouts[0],
            attention_dropout=dropouts[1],
        )
    )
    stage = build_stage(model, groups, range(LAYERS), recompute, 1).to(dtype)
    sample = Sample(np.zeros(LENGTH, np.int64), np.arange(9), np.zeros(9, np.int64), LENGTH // 2)
    micro = collate([sample] * BATCH, range(BATCH), LENGTH, 0)
    streams = streams_of(1, 0, micro.sample_ids)
    kept = [kept_bytes(stage, micro, length, streams) for length in (0, 1, 4)]
    shape = ModelShape(**{name.name: getattr(model, name.name) for name in dataclasses.fields(ModelShape)})
    layout = Layout((LAYERS,), BATCH, 1, recompute=recompute, bytes_per_value=dtype.itemsize)
    state = TrainingState(4, *dropouts)
    stream = BATCH * LENGTH * 128 * dtype.itemsize
    layer = stream if recompute else layer_activation_bytes(shape, layout, state)
    # What the formula leaves out: norms' statistics and the logarithms of attention's sums, about 1/64 of a layer.
    assert kept[2] - kept[1] == pytest.approx(3 * layer, rel=0.02)
    # The head keeps one buffer of logits; beside it what the embedding, the final norm and BERT's transform keep.
    held = activation_bytes(shape, layout, state, 0, 0, 9)
    assert held == BATCH * 9 * VOCAB * dtype.itemsize
    assert held <= kept[0] <= held + 3 * stream
