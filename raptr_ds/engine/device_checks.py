"""What a run's keys ask of the GPU: checked before training, each with what can be set in its place."""

from dataclasses import dataclass

import torch

from raptr_ds.config.load import RunConfig
from raptr_ds.errors import ConfigError


@dataclass(frozen=True)
class GpuFacts:
    """What a GPU can do. capability: CUDA's compute capability; has_bf16: in hardware, not emulated."""

    name: str
    capability: tuple[int, int]
    has_bf16: bool

    @classmethod
    def of(cls, device: torch.device) -> "GpuFacts | None":
        """Return those of a device, None for a CPU."""
        if device.type != "cuda":
            return None
        with torch.cuda.device(device):
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return cls(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device), has_bf16)


def check_gpu(config: RunConfig, gpu: GpuFacts | None) -> None:
    """Check that the GPU, if there is one, has what the run asks of it.

    Raises: ConfigError.
    """
    if gpu is None or config.precision != "bf16" or gpu.has_bf16:
        return
    capability = ".".join(map(str, gpu.capability))
    raise ConfigError(
        f"bf16.enabled=true needs a GPU that computes in bf16 (compute capability 8.0 or higher); {gpu.name} has "
        f"{capability}. Set fp16.enabled to true in place of bf16.enabled, or both to false for fp32."
    )
