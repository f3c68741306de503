"""Small tensors of the host on the device, without waiting for it."""

import torch


def without_waiting(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a CPU tensor's copy on `device`; for a GPU from pinned memory, as a copy from other memory waits."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
