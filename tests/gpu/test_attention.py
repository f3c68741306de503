"""On a GPU: the kernels against fp64, the cross-entropy's too, and a model with them against one without."""

import pytest
import torch
from torch.nn import functional

from raptr_ds.config.sections import ModelSection
from raptr_ds.data.batch import PackedSample, Sample, collate
from raptr_ds.model.stage import build_stage
from raptr_ds.parallel.cross_entropy import cross_entropy
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.paths.path import LayerPath
from raptr_ds.rng import stream
from tests.dropout_masks import streams_of

if not torch.cuda.is_available():
    pytest.skip("needs a GPU that torch sees", allow_module_level=True)

from tests.attention_cases import CASES, Case, errors_of, prefixes, tolerance, very_negative_scores

GPU = torch.device("cuda")
LONG = [Case("long prefix", 1024, 128, prefixes(1024, 500), 0.0), Case("long, dropout", 512, 64, None, 0.1)]


# Each size of head, mask and precision is compiled, for seconds: the rarer precisions on a few cases.
RARE = [case for case in CASES if case.name in {"prefix, dropout", "packed", "odd heads"}]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.bfloat16) for case in (*CASES, *LONG)),
        *((case, dtype) for case in RARE for dtype in (torch.float32, torch.float16)),
    ],
    ids=str,
)
def test_values_and_gradients(case: Case, dtype: torch.dtype) -> None:
    assert max(errors_of(case, dtype, GPU)) <= tolerance(dtype)


def test_very_negative_scores_are_finite() -> None:
    output, gradients = very_negative_scores(GPU)
    assert output[0, 100:, 0, 0].tolist() == [5.0] * 92
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("vocabulary", [32000, 30522])
def test_cross_entropy(groups: ProcessGroups, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(shape, generator=generator) for shape in ((300, 64), (vocabulary, 64), (vocabulary,))]
    given = [tensor.to(GPU, torch.bfloat16).requires_grad_() for tensor in drawn]
    targets = torch.randint(0, vocabulary, (300,), generator=generator).to(GPU)
    hidden, weight, bias = given
    losses = cross_entropy(hidden, weight, bias, targets, vocab_size=vocabulary, groups=groups)
    gradients = torch.autograd.grad(losses.mean(), given)
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    expected = functional.cross_entropy(functional.linear(*exact), targets, reduction="none")
    oracles = torch.autograd.grad(expected.mean(), exact)
    for found, oracle in zip((losses, *gradients), (expected, *oracles), strict=True):
        assert (found.double() - oracle).norm() <= 1.2e-2 * oracle.norm()  # logits are rounded to bf16


@pytest.mark.parametrize(
    ("architecture", "form", "compiled"),
    [
        *((architecture, form, False) for architecture in ("bert", "ul2") for form in ("full", "padded", "packed")),
        ("bert", "full", True),
        ("ul2", "packed", True),
    ],
)
def test_a_model_is_the_same_with_the_kernel(
    groups: ProcessGroups, architecture: str, form: str, compiled: bool
) -> None:
    rng = stream(2, "fused")
    lengths = {"full": [[192], [192]], "padded": [[192], [101]], "packed": [[70, 65, 57], [30, 90]]}[form]
    rows = []
    for row in lengths:
        parts = []
        for length in row:
            tokens = rng.integers(0, 501, length)
            prefix = length if architecture == "bert" else length // 2
            parts.append(Sample(tokens, rng.permutation(length)[:9], tokens[:9], prefix))
        rows.append(PackedSample(tuple(parts)) if form == "packed" else parts[0])
    batch = collate(rows, [3, 8], 192, pad_id=0).to(GPU)
    model = ModelSection(
        architecture=architecture,  # type: ignore[arg-type]
        num_layers=3,
        hidden_size=128,
        num_attention_heads=2,
        seq_length=192,
        vocab_size=501,
        hidden_dropout=0.1,
        attention_dropout=0.1,
    )
    found = []
    for kernel in (False, True):
        stage = build_stage(
            model, groups, range(3), False, 3, compiled=compiled and kernel, attention_kernel=kernel
        ).to(GPU)
        losses = stage(batch.tokens, batch, LayerPath((0, 2), 3), streams_of(1, 4, batch.sample_ids))
        losses.sum().backward()
        found.append((losses.detach(), {n: p.grad for n, p in stage.named_parameters() if p.grad is not None}))
    (expected, gradients), (losses, fused) = found
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert fused.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (fused[name] - gradient).norm() <= 1e-4 * gradient.norm(), name
