"""Compiled blocks: the same losses and gradients as plain ones, and one graph for all layers, steps and paths."""

import itertools

import pytest
import torch
from torch._dynamo.utils import counters

from raptr_ds.config.sections import ModelSection
from raptr_ds.data.batch import MicroBatch, Sample, collate
from raptr_ds.model.compiler import let_integers_wrap, missing_compiler
from raptr_ds.model.stage import Stage, build_stage
from raptr_ds.parallel.dropout import LayerDropout, dropout
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.paths.path import LayerPath
from raptr_ds.rng import stream
from tests.dropout_masks import streams_of

NUM_LAYERS, BATCH = 5, 2  # the shapes of tests/dist/trajectory.py: what is compiled for one is found by the other
PATHS = [
    *(LayerPath(layers, NUM_LAYERS, residual_scale=(5 / 3) ** 0.5) for layers in itertools.combinations(range(5), 3)),
    *(LayerPath(layers, NUM_LAYERS, residual_scale=1.25**0.5) for layers in itertools.combinations(range(5), 4)),
    LayerPath.full(NUM_LAYERS),
]

pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason=f"cannot compile here: {missing_compiler()}")


def model_of(architecture: str) -> ModelSection:
    return ModelSection(
        architecture=architecture,  # type: ignore[arg-type]
        num_layers=NUM_LAYERS,
        hidden_size=32,
        num_attention_heads=4,
        seq_length=16,
        vocab_size=61,
        hidden_dropout=0.1,
        attention_dropout=0.1,
    )


def batch_of(model: ModelSection) -> MicroBatch:
    rng = stream(3, "compile test")
    samples = []
    for _ in range(BATCH):
        tokens = rng.integers(0, 61, model.seq_length)
        samples.append(Sample(tokens, rng.permutation(16)[:4], tokens[:4], 16 if model.architecture == "bert" else 5))
    return collate(samples, range(BATCH), model.seq_length, pad_id=0)


def run(stage: Stage, batch: MicroBatch, path: LayerPath, step: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss of a path in a step, and all its gradients."""
    stage.zero_grad(set_to_none=True)
    loss = stage(batch.tokens, batch, path, streams_of(1, step, batch.sample_ids)).mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("architecture", ["bert", "ul2"])
def test_one_graph_for_all_paths_and_the_same_numbers(
    groups: ProcessGroups, architecture: str, recompute: bool
) -> None:
    torch.compiler.reset()
    counters.clear()
    model = model_of(architecture)
    plain = build_stage(model, groups, range(NUM_LAYERS), recompute, seed=3)
    compiled = build_stage(model, groups, range(NUM_LAYERS), recompute, seed=3, compiled=True)
    assert [name for name, _ in compiled.named_parameters()] == [name for name, _ in plain.named_parameters()]
    batch = batch_of(model)
    for step, path in enumerate(PATHS):
        expected_loss, expected = run(plain, batch, path, step)
        loss, gradients = run(compiled, batch, path, step)
        # Sums in another order: fp32 rounding over tens of terms.
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                gradient, expected[name], atol=2e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )
    with torch.no_grad():
        losses = [stage(batch.tokens, batch, PATHS[-1], None).mean().item() for stage in (plain, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    # With and without a factor on the branches, the evaluation's, the embedding's: nothing per layer, step or path.
    assert counters["stats"]["unique_graphs"] == 4
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("features", [1, 15, 16, 24, 37, 64])
def test_compiled_masks_are_the_eager_ones(features: int) -> None:
    """Rows of no whole number of vectors too: without -fwrapv g++ 12.2 drops stores, or the code crashes."""
    let_integers_wrap()
    torch.compiler.reset()
    masks = streams_of(1, 0, torch.tensor([3, 40, 500])).of_layer(2)

    def drop(x: torch.Tensor, masks: LayerDropout) -> torch.Tensor:
        return dropout(x, 0.1, masks, "mlp_output")

    x = torch.randn(3, 16, features)
    assert torch.equal(torch.compile(drop, dynamic=False)(x, masks), drop(x, masks))


def test_the_compiler_is_told_that_integers_wrap() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler, get_cpp_options

    let_integers_wrap()
    assert "fwrapv" in get_cpp_options(get_cpp_compiler(), do_link=True)[2]
