"""Utilization: executed FLOPs per second as a fraction of what the devices can do."""

import re

# Peak dense bf16 (V100, T4: fp16) FLOP/s of one device, without sparsity, from the vendors' data sheets. The first
# pattern found in the device's name counts, so the special forms stand before the plain ones.
_PEAK_FLOPS = (
    (r"B200", 2250e12),
    (r"GH200|H200", 989e12),
    (r"H100 NVL", 835e12),
    (r"H100 PCIe", 756e12),
    (r"H100|H800", 989e12),
    (r"H20", 148e12),
    (r"A100|A800", 312e12),
    (r"A30", 165e12),
    (r"A40", 149.7e12),
    (r"A10", 125e12),
    (r"L40S", 362e12),
    (r"L40", 181e12),
    (r"L4", 121e12),
    (r"V100", 125e12),
    (r"T4", 65e12),
    (r"RTX 4090", 165.2e12),
    (r"RTX 3090", 71e12),
    (r"MI300X", 1307.4e12),
    (r"MI250X", 383e12),
)


def peak_flops(device_name: str | None, precision: str) -> float | None:
    """Return the peak FLOP/s of one device for dense matrix products, or None where it is not known.

    device_name: as torch.cuda.get_device_name gives it; None for a CPU. precision: "bf16", "fp16" or "fp32"; for fp32
    the answer is None, as it depends on settings of torch (TF32) that this function does not see.
    """
    if device_name is None or precision not in {"bf16", "fp16"}:
        return None
    found = (peak for pattern, peak in _PEAK_FLOPS if re.search(rf"\b({pattern})\b", device_name, re.IGNORECASE))
    return next(found, None)


def model_flops_utilization(flops_per_second: float, peak: float | None, num_devices: int) -> float | None:
    """Return executed FLOP/s of the whole job as a fraction of its devices' peak; None where the peak is not known."""
    return None if peak is None else flops_per_second / (peak * num_devices)
