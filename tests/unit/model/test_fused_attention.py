"""The attention kernels, interpreted on the CPU, against attention spelled out in fp64: values and gradients."""

import pytest
import torch

import tests.interpreted  # noqa: F401 - before the kernels
from raptr_ds.config.derive import derive_model
from raptr_ds.config.sections import ModelSection
from raptr_ds.data.batch import collate
from raptr_ds.data.sample import PackedSample, Sample
from raptr_ds.model.fused_attention import fused_attention
from raptr_ds.model.key_ranges import KeyRanges
from raptr_ds.model.stage import Stage, build_stage
from raptr_ds.parallel.dropout import DropoutStreams, attention_hashes, attention_keep_mask
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.paths.path import Parts, Path
from raptr_ds.rng import stream

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of what is masked

BATCH, HEADS, RATE = 2, 3, 0.1
LAYER = DropoutStreams(7, 3, torch.tensor([5, 90])).of_layer(2)
GLOBAL_HEADS = torch.tensor([4, 5, 7])


def ranges_of(first: torch.Tensor, end: torch.Tensor) -> KeyRanges:
    position = torch.arange(first.shape[1]).expand(first.shape).contiguous()
    queries = torch.searchsorted(end, position, right=True), torch.searchsorted(first, position, right=True)
    return KeyRanges(*(bound.int() for bound in (first, end, *queries)))


def prefixes(length: int, prefix: int) -> KeyRanges:
    position = torch.arange(length)
    end = torch.maximum(position + 1, torch.tensor([[prefix], [min(length, prefix + 17)]]))
    return ranges_of(torch.zeros_like(end), end)


def packed(length: int) -> KeyRanges:
    first, end = torch.zeros(BATCH, length, dtype=torch.long), torch.zeros(BATCH, length, dtype=torch.long)
    rng = stream(1, "packed", length)
    for row in range(BATCH):
        start = 0
        while start < length:
            size = min(length - start, int(rng.integers(1, 60)))
            query = torch.arange(start, start + size)
            first[row, query] = start
            end[row, query] = torch.maximum(query + 1, torch.tensor(start + int(rng.integers(0, size + 1))))
            start += size
    return ranges_of(first, end)


def spelled_out(query, key, value, ranges: KeyRanges | None, rate: float) -> torch.Tensor:
    length = query.shape[2]
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if ranges is not None:
        at = torch.arange(length)
        seen = (at >= ranges.first_key[..., None]) & (at < ranges.end_key[..., None])
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
    weights = scores.softmax(-1)
    if rate:
        keep = attention_keep_mask(rate, LAYER, length, heads=GLOBAL_HEADS)
        weights = torch.where(keep, weights / (1.0 - rate), 0.0)
    return (weights @ value).transpose(1, 2)


# An odd length, one below and above a block, a remainder of 64 by 128 (which other kernels got wrong), very few tokens.
CASES = [
    ("whole", 192, 64, None, 0.0),
    ("whole", 33, 24, None, RATE),
    ("prefix", 192, 64, prefixes(192, 70), 0.0),
    ("prefix, dropout", 130, 32, prefixes(130, 65), RATE),
    ("empty prefix", 127, 64, prefixes(127, 0), RATE),
    ("all prefix", 64, 32, prefixes(64, 64), 0.0),
    ("packed", 257, 32, packed(257), 0.0),
    ("packed, dropout", 192, 64, packed(192), RATE),
    ("wide heads", 70, 128, packed(70), RATE),
    ("odd heads", 40, 96, prefixes(40, 3), RATE),
    ("three tokens", 3, 16, prefixes(3, 0), RATE),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=[f"{name}-{length}-{size}" for name, length, size, _, _ in CASES])
def test_values_and_gradients(case, dtype: torch.dtype) -> None:
    _, length, size, ranges, rate = case
    generator = torch.Generator().manual_seed(length)
    together = torch.randn(BATCH, length, HEADS, 3, size, generator=generator).to(dtype)
    given = [part.requires_grad_() for part in together.permute(3, 0, 2, 1, 4).unbind(0)]  # strided, as the model's
    hashes = attention_hashes(LAYER, length, heads=GLOBAL_HEADS) if rate else None
    output = fused_attention(*given, ranges, hashes, rate)
    weight = torch.randn(output.shape, generator=generator).to(dtype)
    gradients = torch.autograd.grad(output, given, weight)
    exact = [part.detach().double().requires_grad_() for part in given]
    expected = spelled_out(*exact, ranges, rate)
    oracles = torch.autograd.grad(expected, exact, weight.double())
    # bf16: weights and their gradients are rounded to 8 bits before their products, as in every flash kernel.
    tolerance = 1e-6 if dtype == torch.float32 else 1.2e-2
    assert output.dtype == dtype
    for found, oracle in zip((output, *gradients), (expected, *oracles), strict=True):
        assert found.shape == oracle.shape
        assert (found.double() - oracle).norm() <= tolerance * oracle.norm()


def test_very_negative_scores_are_finite() -> None:
    """cuDNN 9 gave NaN for a mask, a length of 64 more than a multiple of 128 and logarithms below -88.7."""
    query, key, value = (torch.zeros(1, 1, 192, 64, dtype=torch.bfloat16) for _ in range(3))
    query[..., 0], key[..., 0] = 1.0, -960.0
    key[0, 0, 5, 0] = 960.0
    value[..., 0] = torch.arange(192)
    given = [part.requires_grad_() for part in (query, key, value)]
    output = fused_attention(*given, ranges_of(*causal(192)))
    assert output[0, 100:, 0, 0].tolist() == [5.0] * 92  # the one key that is not negligible
    for gradient in torch.autograd.grad(output.sum(), given):
        assert gradient.isfinite().all()


def causal(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    end = torch.arange(1, length + 1)[None]
    return torch.zeros_like(end), end


def stages(architecture: str, groups: ProcessGroups) -> tuple[Stage, Stage]:
    model = derive_model(
        ModelSection(
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
    )
    plain, fused = (build_stage(model, groups, range(3), False, 3, attention_kernel=kernel) for kernel in (False, True))
    return plain, fused


PATHS = {
    "layers": Path((0, 2), 3),
    "width": Path((0, 1, 2), 3, parts=Parts(4, ((0, 2), (1,), (0, 1, 2, 3)), ((0, 2), (1, 2, 3), (0,)))),
}


@pytest.mark.parametrize("path", PATHS.values(), ids=list(PATHS))
@pytest.mark.parametrize("form", ["full", "padded", "packed"])
@pytest.mark.parametrize("architecture", ["bert", "ul2"])
@pytest.mark.parametrize("training", [True, False], ids=["dropout", "evaluation"])
def test_a_model_is_the_same_with_the_kernel(
    groups: ProcessGroups, architecture: str, form: str, path: Path, training: bool
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
    streams = DropoutStreams(1, 4, batch.sample_ids) if training else None
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
