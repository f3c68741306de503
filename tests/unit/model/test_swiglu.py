"""SwiGLU as a GPU computes it, one product whose columns are taken apart, and as a CPU does: both are plain torch."""

import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch._inductor import metrics
from torch.nn import functional

from raptr_ds.model.compiler import let_integers_wrap, missing_compiler
from raptr_ds.parallel import layers
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.parallel.layers import GatedColumnLinear, RowLinear

HIDDEN, INNER = 24, 40
ROWS = torch.tensor([6, 7, 0, 1, 78, 79])  # three features' pairs

FORMS = pytest.mark.parametrize("apart", [True, False], ids=["two products", "one product"])


def gated_linear(groups: ProcessGroups, dtype: torch.dtype, bias: bool) -> GatedColumnLinear:
    linear = GatedColumnLinear(HIDDEN, 2 * INNER, bias, groups).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return linear


def inputs(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()


def swiglu(gate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return functional.silu(gate) * value


@FORMS
@pytest.mark.parametrize("rows", [None, ROWS], ids=["all rows", "some rows"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
def test_values_and_gradients_are_plain_torchs(
    groups: ProcessGroups,
    monkeypatch: pytest.MonkeyPatch,
    apart: bool,
    rows: torch.Tensor | None,
    bias: bool,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    """The oracle computes in fp64; a bf16 result has 8 bits, and a sum of some of them a little less."""
    monkeypatch.setattr(layers, "reads_rows_apart", lambda _device: apart)
    linear, x = gated_linear(groups, dtype, bias), inputs(dtype)
    found = swiglu(*(linear(x) if rows is None else linear.of_rows(x, rows)))
    grown = torch.linspace(0.5, 1.5, found.shape[-1], dtype=dtype)
    (found * grown).sum().backward()

    wide = [tensor.detach().double().requires_grad_() for tensor in (x, *linear.parameters())]
    y = functional.linear(*wide)
    y = y if rows is None else y[..., rows]
    expected = swiglu(y[..., 0::2], y[..., 1::2])
    (expected * grown).sum().backward()

    assert found.dtype == dtype
    for one, other in (
        (found, expected),
        *((p.grad, w.grad) for p, w in zip((x, *linear.parameters()), wide, strict=True)),
    ):
        assert one is not None
        assert other is not None
        assert (one - other).abs().max() <= tolerance * other.abs().max()


@FORMS
def test_the_backward_pass_keeps_the_weight_itself(
    groups: ProcessGroups, monkeypatch: pytest.MonkeyPatch, apart: bool
) -> None:
    """A slice or a copy would hold the gathered weight that ZeRO 3 wants to release; its linear is DeepSpeed's."""
    monkeypatch.setattr(layers, "reads_rows_apart", lambda _device: apart)
    monkeypatch.setattr(functional, "linear", zero3_linear_wrap)
    linear, x = gated_linear(groups, torch.float32, bias=False), inputs(torch.float32)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        linear(x)
    of_weight = linear.weight.untyped_storage().data_ptr()
    assert [tensor is linear.weight for tensor in kept if tensor.untyped_storage().data_ptr() == of_weight] == [True]


@pytest.mark.slow
@pytest.mark.skipif(missing_compiler() is not None, reason=f"cannot compile here: {missing_compiler()}")
@FORMS
def test_the_activation_is_one_kernel_in_one_graph(
    groups: ProcessGroups, monkeypatch: pytest.MonkeyPatch, apart: bool
) -> None:
    """In the backward pass too: the gradients of gate and value are written interleaved, where they are computed."""
    monkeypatch.setattr(layers, "reads_rows_apart", lambda _device: apart)
    expand = gated_linear(groups, torch.float32, bias=False)
    contract = RowLinear(INNER, HIDDEN, False, groups)
    with torch.no_grad():
        contract.weight.copy_(torch.linspace(-1, 1, contract.weight.numel()).view_as(contract.weight))

    def mlp(x: torch.Tensor) -> torch.Tensor:
        return contract(swiglu(*expand(x)))

    let_integers_wrap()
    torch.compiler.reset()
    metrics.reset()
    found, plain = inputs(torch.float32), inputs(torch.float32)
    compiled = torch.compile(mlp, fullgraph=True, dynamic=False)
    ours, theirs = compiled(found), mlp(plain)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    assert found.grad is not None
    assert plain.grad is not None
    for one, other in ((ours, theirs), (found.grad, plain.grad)):  # fp32 rounding over hundreds of terms
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()
    if not apart:
        assert metrics.generated_kernel_count == 2
