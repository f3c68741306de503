"""Which code computes attention: chosen once at the start of a run, from the run file and what the device has."""

from dataclasses import dataclass

import torch

from raptr_ds.config.sections import ModelSection
from raptr_ds.errors import ConfigError
from raptr_ds.parallel.triton_check import is_interpreted, triton_obstacle

_KEY = "raptr_ds.train.attention_backend"
_LARGEST_HEAD = 256
_WIDE_HEAD = 128
_WIDE_HEADS_BYTES = 163_840  # of a block's shared memory in fp32 (114,688 in bf16); 8.0 and 9.0 have them


@dataclass(frozen=True)
class AttentionBackend:
    """uses_kernel: masks and dropout go through our Triton kernel; description, warning: lines for the run's start."""

    uses_kernel: bool
    description: str
    warning: str | None = None


def choose_attention(
    wanted: str, model: ModelSection, is_packed: bool, device_type: str, obstacle: str | None
) -> AttentionBackend:
    """Return the backend for raptr_ds.train.attention_backend = `wanted` on a kind of device.

    obstacle: why the kernel cannot run on the run's devices, by `kernel_obstacle`; None if it can.
    Raises: ConfigError if the kernel is asked for by name and cannot run there.
    """
    by_torch = "torch's scaled_dot_product_attention"
    has_dropout = bool(model.attention_dropout)
    needs = [
        *(["prefix mask"] if model.architecture == "ul2" else []),
        *(["packed documents"] if is_packed else []),
        *(["dropout"] if has_dropout else []),
    ]
    spelled_out = by_torch + (", spelled out where there is dropout" if has_dropout else "")
    if wanted == "sdpa" or (wanted == "auto" and device_type == "cpu"):
        return AttentionBackend(False, spelled_out)
    if obstacle is None:
        kernel = f"Triton kernel for {', '.join(needs) or 'padding'}"
        return AttentionBackend(True, kernel + ("" if "prefix mask" in needs or has_dropout else f", else {by_torch}"))
    if wanted == "triton":
        raise ConfigError(
            f"{_KEY}='triton' cannot run here: {obstacle}. Set {_KEY} to 'sdpa', or leave it out: the best that runs "
            "here is chosen."
        )
    slower = "with a dense mask and spelled-out dropout" if has_dropout else "with a dense mask"
    warning = f"attention runs {slower}, slower and with more memory: the Triton kernel cannot run here ({obstacle})"
    return AttentionBackend(False, spelled_out, warning if needs else None)


def kernel_obstacle(model: ModelSection, device: torch.device) -> str | None:
    """Return why the kernel cannot run on a device, None if it can."""
    if device.type != "cuda":
        return None if is_interpreted() else f"it needs a GPU and this run is on {device.type.upper()}s"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs a GPU of compute capability 8.0 or more, this one has {capability[0]}.{capability[1]}"
    head_dim = model.head_dim
    if head_dim > _LARGEST_HEAD:
        return f"heads have {head_dim} dimensions, and it takes at most {_LARGEST_HEAD}"
    if head_dim > _WIDE_HEAD:
        properties = torch.cuda.get_device_properties(device)
        shared = properties.shared_memory_per_block_optin  # pyright: ignore[reportAttributeAccessIssue] - not in the stubs
        if shared < _WIDE_HEADS_BYTES:  # as of 8.6, 8.9 and 12.0, which have 101,376
            return (
                f"heads of more than {_WIDE_HEAD} dimensions take {_WIDE_HEADS_BYTES:,} bytes of shared memory, and "
                f"this GPU has {shared:,}"
            )
    return triton_obstacle()
