"""The attention kernels, interpreted on the CPU, against attention spelled out in fp64: values and gradients."""

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import tests.interpreted  # noqa: F401 - before the kernels
from raptr_ds.config.sections import ModelSection
from raptr_ds.data.batch import PackedSample, Sample, collate
from raptr_ds.model import fused_attention
from raptr_ds.model.compiler import missing_compiler
from raptr_ds.model.stage import Stage, build_stage
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.paths.path import LayerPath, Parts
from raptr_ds.rng import stream
from tests.attention_cases import CASES, Case, errors_of, tolerance, very_negative_scores
from tests.dropout_masks import streams_of

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of what is masked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: Case, dtype: torch.dtype) -> None:
    assert max(errors_of(case, dtype, torch.device("cpu"))) <= tolerance(dtype)


def test_very_negative_scores_are_finite() -> None:
    output, gradients = very_negative_scores(torch.device("cpu"))
    assert output[0, 100:, 0, 0].tolist() == [5.0] * 92  # the one key that is not negligible
    assert all(gradient.isfinite().all() for gradient in gradients)


class _Grids:
    """Kernels that do nothing but note their grids."""

    def __init__(self) -> None:
        self.noted: list[tuple[int, ...]] = []

    def __getattr__(self, _kernel: str) -> "_Grids":
        return self

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.noted.append(grid)
        return lambda *_arguments, **_constants: None


def test_many_sequences_and_heads_fit_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA refuses to launch a kernel with more than 65,535 programs along any dim but the first."""
    grids = _Grids()
    monkeypatch.setattr(fused_attention, "_KERNELS", grids)
    query = torch.ones(5462, 12, 2, 16, requires_grad=True)  # 65,544 heads
    fused_attention.fused_attention(query, query, query, None).sum().backward()
    assert len(grids.noted) == 4
    for first, *others in grids.noted:
        assert first < 1 << 31
        assert all(programs < 1 << 16 for programs in others)


def stages(architecture: str, groups: ProcessGroups, compiled: bool = False) -> tuple[Stage, Stage]:
    """Return a model without the kernel, and one with it."""
    model = ModelSection(
        architecture=architecture,  # type: ignore[arg-type]
        num_layers=3,
        hidden_size=32,
        num_attention_heads=4,
        seq_length=24,
        vocab_size=61,
        hidden_dropout=0.1,
        attention_dropout=0.1,
        init_method_std=0.2,
    )
    plain = build_stage(model, groups, range(3), False, 3)
    return plain, build_stage(model, groups, range(3), False, 3, compiled=compiled, attention_kernel=True)


PATHS = {
    "layers": LayerPath((0, 2), 3),
    "width": LayerPath((0, 1, 2), 3, parts=Parts(4, ((0, 2), (1,), (0, 1, 2, 3)), ((0, 2), (1, 2, 3), (0,)))),
}


@pytest.mark.parametrize("path", PATHS.values(), ids=list(PATHS))
@pytest.mark.parametrize("form", ["full", "padded", "packed"])
@pytest.mark.parametrize("architecture", ["bert", "ul2"])
@pytest.mark.parametrize("training", [True, False], ids=["dropout", "evaluation"])
def test_a_model_is_the_same_with_the_kernel(
    groups: ProcessGroups, architecture: str, form: str, path: LayerPath, training: bool
) -> None:
    rng = stream(2, "fused")
    lengths = {"full": [[24], [24]], "padded": [[24], [13]], "packed": [[7, 12, 5], [3, 9]]}[form]
    samples = [
        [
            Sample(tokens, rng.permutation(n)[:2], tokens[:2], n if architecture == "bert" else n // 2)
            for n in row
            for tokens in [rng.integers(0, 61, n)]
        ]
        for row in lengths
    ]
    rows = [PackedSample(tuple(row)) if form == "packed" else row[0] for row in samples]
    batch = collate(rows, [3, 8], 24, pad_id=0)
    streams = streams_of(1, 4, batch.sample_ids) if training else None
    found = []
    for stage in stages(architecture, groups):
        losses = stage(batch.tokens, batch, path, streams)
        losses.sum().backward()
        found.append((losses.detach(), {n: p.grad for n, p in stage.named_parameters() if p.grad is not None}))
    (expected, gradients), (losses, fused) = found
    torch.testing.assert_close(losses, expected, rtol=2e-6, atol=2e-6)
    assert fused.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (fused[name] - gradient).abs().max() <= 2e-5 * gradient.abs().max(), name


@pytest.mark.slow
@pytest.mark.skipif(missing_compiler() is not None, reason=f"cannot compile here: {missing_compiler()}")
def test_a_compiled_block_holds_the_kernel_as_one_operation(groups: ProcessGroups) -> None:
    torch.compiler.reset()
    counters.clear()
    rng = stream(2, "fused")
    tokens = rng.integers(0, 61, 24)
    batch = collate([Sample(tokens, rng.permutation(24)[:4], tokens[:4], 9)] * 2, [3, 8], 24, pad_id=0)
    plain, fused = stages("ul2", groups, compiled=True)
    for step, path in enumerate((LayerPath((0, 2), 3), LayerPath((1,), 3), LayerPath.full(3))):
        streams = streams_of(1, step, batch.sample_ids)
        losses, gradients = [], []
        for stage in (plain, fused):
            losses.append(stage(batch.tokens, batch, path, streams).sum())
            last = stage.layers[str(path.layers[-1])]
            gradients.append(torch.autograd.grad(losses[-1], last.parameters()))
        assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-6)
        for expected, gradient in zip(*gradients, strict=True):
            assert (gradient - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert counters["stats"]["unique_graphs"] == 2  # the blocks', and the embedding's dropout
    assert not counters["graph_break"]
