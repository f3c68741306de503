"""Peaks of devices, and utilization against sums done by hand."""

import pytest

from raptr_ds.runtime.utilization import model_flops_utilization, peak_flops


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A10", 125e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("Some New Card 9000", None),
        (None, None),
    ],
)
def test_peak_by_name(name, peak):
    assert peak_flops(name, "bf16") == peak
    assert peak_flops(name, "fp32") is None


def test_utilization_counts_all_devices():
    assert model_flops_utilization(4 * 312e12 * 0.4, 312e12, 4) == pytest.approx(0.4)
    assert model_flops_utilization(1e12, None, 4) is None
