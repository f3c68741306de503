"""Layers that run in parts: what torch computes with the whole layer, the idle parts' outputs multiplied by zero."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from raptr_ds.config.sections import ModelSection
from raptr_ds.model.block import Block
from raptr_ds.model.initialization import initialize
from raptr_ds.parallel.groups import ProcessGroups

HIDDEN, HEADS, LENGTH = 24, 4, 5


def model_of(architecture: str) -> ModelSection:
    return ModelSection(
        architecture=architecture,  # type: ignore[arg-type]
        num_layers=2,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        seq_length=LENGTH,
        vocab_size=11,
        ffn_hidden_size=4 * HIDDEN,
        position_embedding="learned",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=0.3,
    )


def masked(block: Block, x: torch.Tensor, heads: list[int], blocks: list[int], scale: float) -> torch.Tensor:
    """Return the block's output from its weights alone: every head and feature is computed, the idle ones erased."""
    width = HIDDEN // HEADS
    keep_head = torch.tensor([head in heads for head in range(HEADS)]).repeat_interleave(width)
    inner = 4 * HIDDEN
    keep_feature = torch.tensor([number in blocks for number in range(HEADS)]).repeat_interleave(inner // HEADS)
    attention, mlp = block.attention, block.mlp
    qkv = functional.linear(block.attention_norm(x), attention.qkv.weight, attention.qkv.bias)
    outputs = []
    for head in range(HEADS):
        query, key, value = qkv[..., 3 * width * head : 3 * width * (head + 1)].split(width, dim=-1)
        outputs.append((query @ key.transpose(1, 2) / width**0.5).softmax(-1) @ value)
    mixed = torch.cat(outputs, dim=-1) * keep_head
    x = x + scale * functional.linear(mixed, attention.output.weight, attention.output.bias)
    normalized = block.mlp_norm(x)
    expanded = functional.linear(normalized, mlp.expand.weight, mlp.expand.bias)
    if expanded.shape[-1] == 2 * inner:
        expanded = functional.silu(expanded[..., 0::2]) * expanded[..., 1::2]
    else:
        expanded = functional.gelu(expanded)
    return x + scale * functional.linear(expanded * keep_feature, mlp.contract.weight, mlp.contract.bias)


@pytest.mark.parametrize("architecture", ["bert", "ul2"])
@pytest.mark.parametrize(("heads", "blocks"), [([1, 3], [0, 1]), ([2], [3]), ([0, 1, 2, 3], [0, 2, 3]), ([], [1])])
def test_parts_are_the_whole_layer_without_the_others(
    architecture: str, heads: list[int], blocks: list[int], groups: ProcessGroups
) -> None:
    model = model_of(architecture)
    layer = Block(model, groups)
    initialize(layer, model, seed=5)
    with torch.no_grad():  # biases that are zero would hide a wrong one
        for number, (name, parameter) in enumerate(layer.named_parameters()):
            if name.endswith("bias"):
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()) * (1 + number / 10))
    layer.double()
    x = torch.randn(2, LENGTH, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scale = torch.tensor(1.25, dtype=torch.float64)
    found = layer(x, None, None, None, scale, torch.tensor(heads).long(), torch.tensor(blocks).long())
    expected = masked(layer, x, heads, blocks, 1.25)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert_same_gradients(layer, (found * weight).sum(), (expected * weight).sum())


def assert_same_gradients(layer: nn.Module, found: torch.Tensor, expected: torch.Tensor) -> None:
    names, parameters = zip(*layer.named_parameters(), strict=True)
    ours, theirs = torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters)
    for name, one, other in zip(names, ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-11, atol=1e-11), name
