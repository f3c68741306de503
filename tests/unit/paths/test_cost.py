"""Cost against plain torch: FLOPs against torch's counter, parameters against the modules' own."""

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from raptr_ds.config.sections import ModelSection
from raptr_ds.paths.cost import StepFlops, num_parameters, step_flops
from tests.model_shapes import model_shape
from tests.path_methods import path_method

BERT = model_shape("bert", layers=3, hidden=16, length=12, vocabulary=50, ffn=40)
UL2 = model_shape("ul2", layers=3, hidden=16, length=12, vocabulary=50, ffn=24)


class Layer(nn.Module):
    """A pre-norm layer of plain modules and matrix products."""

    def __init__(self, shape: ModelSection):
        super().__init__()
        hidden, ffn, bias = shape.hidden_size, shape.ffn_hidden_size, shape.add_bias_linear
        norm = nn.LayerNorm if shape.normalization == "layernorm" else nn.RMSNorm
        self.norms = nn.ModuleList([norm(hidden), norm(hidden)])
        self.projections = nn.ModuleList(nn.Linear(hidden, hidden, bias) for _ in range(4))
        self.up = nn.ModuleList(nn.Linear(hidden, ffn, bias) for _ in range(2 if shape.activation == "swiglu" else 1))
        self.down = nn.Linear(ffn, hidden, bias)

    def forward(self, x):
        query, key, value = (projection(self.norms[0](x)) for projection in list(self.projections)[:3])
        heads = [part.unflatten(-1, (2, -1)).transpose(1, 2) for part in (query, key, value)]
        mixed = (heads[0] @ heads[1].transpose(-1, -2)).softmax(-1) @ heads[2]
        x = x + self.projections[3](mixed.transpose(1, 2).flatten(-2))
        branches = [up(self.norms[1](x)) for up in self.up]
        inner = nn.functional.silu(branches[0]) * branches[1] if len(branches) == 2 else nn.functional.gelu(branches[0])
        return x + self.down(inner)


class Model(nn.Module):
    """Embedding, layers, final norm and head, skipping the layers that are not in the path."""

    def __init__(self, shape: ModelSection):
        super().__init__()
        hidden = shape.hidden_size
        self.words = nn.Embedding(shape.vocab_size, hidden)
        self.positions = nn.Embedding(shape.seq_length, hidden) if shape.position_embedding == "learned" else None
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        norm = nn.LayerNorm if shape.normalization == "layernorm" else nn.RMSNorm
        self.norm = norm(hidden)
        self.transform = None
        if shape.architecture == "bert":
            self.transform = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), norm(hidden))
        self.head = nn.Linear(hidden, shape.vocab_size, bias=shape.architecture == "bert")
        if shape.tie_word_embeddings:
            self.head.weight = self.words.weight

    def forward(self, tokens, positions, path, checkpointing=False):
        x = self.words(tokens) + (0 if self.positions is None else self.positions.weight)
        for index in path:
            layer = self.layers[index]
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False) if checkpointing else layer(x)
        predicted = self.norm(x).flatten(0, 1)[positions]
        return self.head(predicted if self.transform is None else self.transform(predicted))


@pytest.mark.parametrize("shape", [BERT, UL2], ids=["bert", "ul2"])
@pytest.mark.parametrize("path", [(0, 1, 2), (0, 2), ()])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_step_flops_equal_torchs_count(shape, path, checkpointing):
    # Early stop leaves out the last product of each layer: a saving of torch's non-reentrant form alone.
    model, tokens, positions = Model(shape), torch.zeros(4, shape.seq_length, dtype=torch.int64), torch.arange(7)
    with FlopCounterMode(display=False) as counter, torch.utils.checkpoint.set_checkpoint_early_stop(False):
        model(tokens, positions, path, checkpointing).sum().backward()
    assert counter.get_total_flops() == step_flops(shape, len(path), 4, 7, checkpointing)


@pytest.mark.parametrize("architecture", ["bert", "ul2"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_equal_the_modules_own(architecture, tied):
    base = BERT if architecture == "bert" else UL2
    shape = base.model_copy(update={"tie_word_embeddings": tied})
    assert num_parameters(shape) == sum(parameter.numel() for parameter in Model(shape).parameters())


def test_bert_base_has_the_size_that_everyone_knows():
    shape = model_shape("bert", layers=12, hidden=768, heads=12, length=512, vocabulary=30522, ffn=3072)
    # The post-norm original: 109,482,240 with token types and pooler (two embeddings, 768^2 + 768), without the head.
    head_and_final_norm = (768**2 + 768 + 2 * 768 + 30522) + 2 * 768
    embedding_norm, token_types, pooler = 2 * 768, 2 * 768, 768**2 + 768
    assert num_parameters(shape) - head_and_final_norm == 109_482_240 - embedding_norm - token_types - pooler


@pytest.mark.parametrize(
    "values",
    [
        {"method": "raptr", "schedule": "2-3", "full_warmup_steps": 5, "split": "proportional"},
        {"method": "full"},
        {"method": "constant", "constant_length": 2},
        {"method": "pld", "pld_gamma": 0.05},
        {"method": "layerdrop", "layerdrop": 0.4},
        {"method": "stacking", "schedule": "1-2-3"},
    ],
)
def test_expected_flops_left_sum_the_steps(values):
    method = path_method(num_layers=3, num_steps=40, seed=1, **values)
    for step in (0, 4, 5, 20, 39, 40, 41):
        head, layer = step_flops(BERT, 0, 8, 14), step_flops(BERT, 1, 8, 14) - step_flops(BERT, 0, 8, 14)
        expected = sum(head + layer * method.marginals_at(later).sum() for later in range(step, 40))
        assert StepFlops(BERT, 8).flops_left(method, step, 14) == pytest.approx(expected, rel=1e-12)


def test_fixed_length_paths_cost_what_was_expected():
    method = path_method(method="raptr", schedule="2-3", num_layers=3, num_steps=40, seed=1)
    executed = sum(step_flops(UL2, method.path_at(step).length, 8, 14) for step in range(40))
    assert executed == pytest.approx(StepFlops(UL2, 8).flops_left(method, 0, 14), rel=1e-12)
