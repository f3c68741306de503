"""Cross-entropy against plain torch: losses and all gradients, with and without bias and padding, in every type.

In pieces, as CPUs compute it, and by the kernels of GPUs, interpreted.
"""

import pytest
import torch
from torch.nn import functional

import tests.interpreted  # noqa: F401 - before the kernels
from raptr_ds.parallel import cross_entropy as module
from raptr_ds.parallel import cross_entropy_kernel
from raptr_ds.parallel.cross_entropy import cross_entropy
from raptr_ds.parallel.groups import ProcessGroups

N, HIDDEN, VOCAB = 37, 16, 61
# Sums of tens of terms in another order; bf16 keeps 8 bits of each gradient.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def inputs(dtype: torch.dtype, has_bias: bool, rows: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(N, HIDDEN), (rows, HIDDEN), *([(rows,)] if has_bias else [])]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("piece", [1, 200, 1 << 20])
def test_losses_and_gradients_are_torchs(
    monkeypatch: pytest.MonkeyPatch, groups: ProcessGroups, dtype: torch.dtype, has_bias: bool, padding: int, piece: int
) -> None:
    monkeypatch.setattr(module, "_CPU_PIECE_ELEMENTS", piece)
    check_against_torch(groups, dtype, has_bias, padding)


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [16, 64])
def test_the_kernels_losses_and_gradients_are_torchs(
    monkeypatch: pytest.MonkeyPatch, groups: ProcessGroups, dtype: torch.dtype, has_bias: bool, padding: int, block: int
) -> None:
    monkeypatch.setattr(module, "_has_kernel", lambda _hidden, _group: True)
    monkeypatch.setattr(cross_entropy_kernel, "_BLOCK", block)
    check_against_torch(groups, dtype, has_bias, padding)


def check_against_torch(groups: ProcessGroups, dtype: torch.dtype, has_bias: bool, padding: int) -> None:
    targets = torch.randint(0, VOCAB, (N,), generator=torch.Generator().manual_seed(2))
    weights = torch.linspace(-1.0, 2.0, N, dtype=torch.float64)  # of each position: the gradient must follow it
    given = inputs(dtype, has_bias, VOCAB + padding)
    hidden, weight, *bias = given
    losses = cross_entropy(hidden, weight, bias[0] if bias else None, targets, vocab_size=VOCAB, groups=groups)
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (losses * weights).sum().backward()

    plain = [tensor.detach().double().requires_grad_() for tensor in given]
    logits = functional.linear(plain[0], plain[1], plain[2] if has_bias else None)[:, :VOCAB]
    expected = functional.cross_entropy(logits, targets, reduction="none")
    (expected * weights).sum().backward()
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(losses.double(), expected, rtol=tolerance, atol=tolerance)
    for tensor, oracle in zip(given, plain, strict=True):
        assert tensor.grad is not None
        assert oracle.grad is not None
        assert (tensor.grad.double() - oracle.grad).abs().max() < tolerance * oracle.grad.abs().max()


@pytest.mark.parametrize("by_kernel", [False, True], ids=["pieces", "kernel"])
def test_a_sure_prediction_keeps_its_gradient_in_bf16(
    monkeypatch: pytest.MonkeyPatch, groups: ProcessGroups, by_kernel: bool
) -> None:
    """The gradient at a target of probability p is p - 1: 0.999 in bf16 is 1, and would leave none."""
    monkeypatch.setattr(module, "_has_kernel", lambda _hidden, _group: by_kernel)
    hidden = torch.ones(1, 1, dtype=torch.bfloat16)
    weight = torch.tensor([[7.0], [0.0]], dtype=torch.bfloat16, requires_grad=True)
    cross_entropy(hidden, weight, None, torch.tensor([0]), vocab_size=2, groups=groups).sum().backward()
    assert weight.grad is not None
    expected = torch.tensor(-7.0).exp() / (1 + torch.tensor(-7.0).exp())
    torch.testing.assert_close(weight.grad[:, 0].float(), torch.stack([-expected, expected]), rtol=1e-2, atol=0)


@pytest.mark.parametrize("by_kernel", [False, True], ids=["pieces", "kernel"])
def test_no_predictions_are_no_losses(monkeypatch: pytest.MonkeyPatch, groups: ProcessGroups, by_kernel: bool) -> None:
    monkeypatch.setattr(module, "_has_kernel", lambda _hidden, _group: by_kernel)
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.ones(5, 4, requires_grad=True)
    losses = cross_entropy(hidden, weight, None, torch.zeros(0).long(), vocab_size=5, groups=groups)
    losses.sum().backward()
    assert losses.shape == (0,)
    assert weight.grad is not None
    assert not weight.grad.any()
