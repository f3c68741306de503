"""Dropout's masks on a GPU: those of the CPU, bit for bit, eager and compiled."""

import pytest
import torch

from raptr_ds.parallel.dropout import LayerDropout, attention_keep_mask
from tests.dropout_masks import streams_of
from tests.gpu.kit.measured_device import DEVICE

SAMPLES = torch.arange(100, 104)
RATE, POSITIONS, HEADS, FEATURES = 0.1, 512, 12, 768


def masks(layer: LayerDropout) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention's mask and a hidden one."""
    device = layer.sample_ids.device
    heads, features = torch.arange(HEADS, device=device), torch.arange(FEATURES, device=device)
    return (
        attention_keep_mask(RATE, layer, POSITIONS, heads=heads),
        layer.keep_mask(RATE, "mlp_output", POSITIONS, features),
    )


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_masks_are_the_cpus(compiled: bool) -> None:
    if compiled and DEVICE.type == "cpu":
        pytest.skip("tests/unit/model/test_compile.py compiles on a CPU")
    make = torch.compile(masks, dynamic=False) if compiled else masks
    found = make(streams_of(7, 11, SAMPLES.to(DEVICE)).of_layer(3))
    expected = masks(streams_of(7, 11, SAMPLES).of_layer(3))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.cpu(), other)
