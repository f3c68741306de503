"""The activation formulas against what torch keeps for the real model's backward pass, on a CPU and as on a GPU."""

from dataclasses import replace

import pytest
import torch

from raptr_ds.planner.memory import activation_bytes, layer_activation_bytes, rank_memory
from raptr_ds.planner.step_time import Device, Layout, Setting

# Longer than what attention on a CPU computes in fp32 in place of 16 bits, which the formula leaves out.
from tests.kept_tensors import (
    BATCH,
    LAYERS,
    LENGTH,
    PREDICTED,
    VOCAB,
    build,
    kept_by_a_layer,
    kept_bytes,
    model_of,
)


@pytest.mark.parametrize(("stage", "copies"), [(1, 0), (2, 1), (3, 2)])
def test_sums_of_another_type_than_the_working_one_take_copies_of_a_bucket(stage, copies):
    layout = Layout((LAYERS,), 1, 4, data=2, zero_stage=stage, gradient_bytes_per_value=4, reduce_bucket=1000)
    in_fp32, in_bf16 = (
        rank_memory(
            Setting(model_of("bert", (0.0, 0.0)), replace(layout, summed_bytes_per_value=size), Device(), PREDICTED),
            0,
            LAYERS,
        )
        for size in (4, 2)
    )
    assert in_fp32.gradients - in_bf16.gradients == copies * 1000 * 4


@pytest.mark.parametrize("architecture", ["bert", "ul2"])
@pytest.mark.parametrize("dropouts", [(0.0, 0.0), (0.1, 0.1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True])
def test_activations_are_what_autograd_keeps(groups, architecture, dropouts, dtype, recompute):
    stage, micro = build(groups, model_of(architecture, dropouts), dtype, recompute)
    kept = [kept_bytes(stage, micro, length) for length in (0, 1, 4)]
    layout = Layout((LAYERS,), BATCH, 1, recompute=recompute, bytes_per_value=dtype.itemsize)
    setting = Setting(model_of(architecture, dropouts), layout, Device(is_gpu=False), PREDICTED)
    stream = BATCH * LENGTH * 128 * dtype.itemsize
    layer = stream if recompute else layer_activation_bytes(setting)
    # What the formula leaves out: norms' statistics and the logarithms of attention's sums, about 1/64 of a layer.
    assert kept[2] - kept[1] == pytest.approx(3 * layer, rel=0.02)
    # The head keeps one buffer of logits; beside it what the embedding, the final norm and BERT's transform keep.
    held = activation_bytes(setting, 0, 0)
    assert held == BATCH * PREDICTED * VOCAB * dtype.itemsize
    assert held <= kept[0] <= held + 3 * stream


@pytest.mark.parametrize("architecture", ["bert", "ul2"])
@pytest.mark.parametrize("dropouts", [(0.0, 0.0), (0.1, 0.1)])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_layers_in_part_keep_their_whole_stream_and_copies_of_the_weights_that_run(
    groups, architecture, dropouts, width
):
    model = model_of(architecture, dropouts)
    model = model.model_copy(update={"ffn_hidden_size": 4 * (model.ffn_hidden_size // 4)})
    stage, micro = build(groups, model, torch.float32)
    kept = [kept_bytes(stage, micro, length, width) for length in (1, 4)]
    setting = Setting(model, Layout((LAYERS,), BATCH, 1, bytes_per_value=4), Device(is_gpu=False), PREDICTED)
    expected = layer_activation_bytes(replace(setting, width=width / 4))
    # What the formula leaves out is that of a whole layer.
    assert (kept[1] - kept[0]) / 3 == pytest.approx(expected, abs=0.02 * layer_activation_bytes(setting))


@pytest.mark.parametrize("architecture", ["bert", "ul2"])
@pytest.mark.parametrize("rate", [0.0, 0.1])
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_a_layer_keeps_what_the_formula_says(groups, architecture, rate, compiled):
    """Attention's kernel keeps no scores, whatever its dropout: the formula is given one."""
    layout = Layout((LAYERS,), BATCH, 1, compiled=compiled)
    expected = layer_activation_bytes(Setting(model_of(architecture, (rate, rate)), layout, Device(), PREDICTED))
    # What the formula leaves out: norms' statistics, 1/128 of the stream each in so narrow a model.
    assert kept_by_a_layer(groups, architecture, rate, compiled) == pytest.approx(expected, rel=0.02)
