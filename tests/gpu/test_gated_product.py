"""SwiGLU on a GPU: one product there, with plain torch's values and gradients, and not slower than two."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from raptr_ds.parallel import layers
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.parallel.layers import GatedColumnLinear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and torch sees none here")

ROWS, HIDDEN, INNER = 8 * 1024, 2304, 6144  # about ul2_1b's
SEVERAL = 20


def gated_linear(groups: ProcessGroups) -> GatedColumnLinear:
    linear = GatedColumnLinear(HIDDEN, 2 * INNER, False, groups)
    assert linear.weight is not None
    torch.nn.init.normal_(linear.weight, std=0.02, generator=torch.Generator().manual_seed(1))
    return linear.to("cuda", torch.bfloat16)


def inputs() -> torch.Tensor:
    x = torch.randn(1, ROWS, HIDDEN, generator=torch.Generator().manual_seed(2))
    return x.to("cuda", torch.bfloat16).requires_grad_()


def swiglu(gate: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return functional.silu(gate) * value


def test_values_and_gradients_are_plain_torchs(groups: ProcessGroups) -> None:
    """The oracle computes in fp32; bf16 rounds inputs of products and results to 8 bits."""
    linear, x = gated_linear(groups), inputs()
    found = swiglu(*linear(x))
    found.sum().backward()
    parameter = linear.weight
    assert parameter is not None
    wide, weight = (tensor.detach().float().requires_grad_() for tensor in (x, parameter))
    y = functional.linear(wide, weight)
    expected = swiglu(y[..., 0::2], y[..., 1::2])
    expected.sum().backward()
    for one, other in ((found, expected), (x.grad, wide.grad), (parameter.grad, weight.grad)):
        assert one is not None
        assert other is not None
        assert (one - other).norm() <= 1e-2 * other.norm()


def test_one_product_is_not_slower_than_two(
    groups: ProcessGroups, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    """Forward and backward pass, compiled as blocks are; a twentieth is left to the clock."""
    one, two = (_milliseconds(groups, monkeypatch, apart) for apart in (False, True))
    record_property("finding", f"one product {one:.3f} ms, two products {two:.3f} ms")
    assert one <= 1.05 * two


def _milliseconds(groups: ProcessGroups, monkeypatch: pytest.MonkeyPatch, apart: bool) -> float:
    """Return the median time of a form."""
    linear, x, times = gated_linear(groups), inputs(), []
    torch.compiler.reset()
    with monkeypatch.context() as patch:
        patch.setattr(layers, "reads_rows_apart", lambda _device: apart)
        layer = torch.compile(lambda x: swiglu(*linear(x)), fullgraph=True, dynamic=False)
        for _ in range(SEVERAL):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            layer(x).sum().backward()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
    return sorted(times)[SEVERAL // 2]
