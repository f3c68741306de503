"""From a run's configuration to its engine."""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from raptr_ds.config.derive import derive_overlap
from raptr_ds.config.run import RunConfig
from raptr_ds.engine.deepspeed_engine import NEVER
from raptr_ds.engine.pipeline import PipelineEngine
from raptr_ds.engine.protocol import Engine
from raptr_ds.engine.zero import ZeroEngine
from raptr_ds.errors import ConfigError
from raptr_ds.model.attention_backend import AttentionBackend, choose_attention, kernel_obstacle
from raptr_ds.model.compiler import missing_compiler
from raptr_ds.model.stage import build_stage
from raptr_ds.parallel.agreement import gathered, together
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.paths.stages import stage_layers

_COMPILED = {"Adam": "FusedAdamBuilder", "AdamW": "FusedAdamBuilder", "Lion": "FusedLionBuilder"}
"""DeepSpeed's optimizers that are compiled where they are used, and what builds them (deepspeed/ops/op_builder)."""


def build_engine(config: RunConfig, groups: ProcessGroups) -> Engine:
    """Return the engine of this rank, with its initial weights. Collective: all ranks call it.

    config: complete, with the vocabulary's size. Raises: ConfigError if the device cannot do what the run file asks.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    together(groups, lambda: check_device(config, groups.device))  # machines may have different GPUs
    together(groups, lambda: check_optimizer(config))  # and compilers
    layers = stage_layers(config.parallel.pipeline_layers)
    stage = build_stage(
        config.model,
        groups,
        layers[groups.pipeline_rank],
        recompute=config.parallel.activation_checkpointing,
        seed=config.train.seed,
        compiled=compilation_of(config, groups).is_compiled,
        keep_activations_up_to=config.parallel.keep_activations_up_to,
        attention_kernel=attention_of(config, groups).uses_kernel,
    )
    engine_class = PipelineEngine if groups.topology.pipeline > 1 else ZeroEngine
    deepspeed_config = _deepspeed_config(config, on_gpu=groups.device.type == "cuda")
    return engine_class(deepspeed_config, stage, groups, config.train.seed, config.path.skipped_update)


def attention_of(config: RunConfig, groups: ProcessGroups) -> AttentionBackend:
    """Return what computes attention in this run, the same on all ranks. Collective: all ranks call it.

    Raises: ConfigError if the backend that the run file asks for cannot run here.
    """
    wanted, device_type = config.train.attention_backend, groups.device.type
    obstacle = None
    if wanted == "triton" or (wanted == "auto" and device_type != "cpu"):  # else Triton is not imported at all
        obstacle = _anywhere(groups, kernel_obstacle(config.model, groups.device))
    return choose_attention(wanted, config.model, config.data.packing, device_type, obstacle)


def _anywhere(groups: ProcessGroups, obstacle: str | None) -> str | None:
    """Return the obstacle of the first rank that has one, else None: all ranks must compute in the same way."""
    if groups.topology.world_size == 1:
        return obstacle
    found = gathered(obstacle, groups.control)
    return next((f"{text}, on rank {rank}" for rank, text in enumerate(found) if text is not None), None)


@dataclass(frozen=True)
class Compilation:
    """Whether layers are compiled, and a warning to print if they should be and cannot."""

    is_compiled: bool
    warning: str | None = None


def compilation_of(config: RunConfig, groups: ProcessGroups) -> Compilation:
    """Return whether layers are compiled in this run, the same on all ranks. Collective: all ranks call it.

    Raises: ConfigError if the run file asks for compilation and there is no compiler.
    """
    if not config.compiles(groups.device.type == "cuda"):
        return Compilation(False)
    reason = _anywhere(groups, missing_compiler(groups.device.type))
    if reason is None:
        return Compilation(True)
    if config.train.compile:
        raise ConfigError(
            f"raptr_ds.train.compile=true needs a C++ compiler, on a GPU Triton as well, and one is missing here "
            f"({reason}). Install it (Debian: apt-get install g++; pip install triton), name the compiler in the "
            "environment variable CXX, or set raptr_ds.train.compile to false."
        )
    return Compilation(False, f"layers are not compiled, which is slower: {reason}")


def check_device(config: RunConfig, device: torch.device) -> None:
    """Check that a rank's device, which is torch's current one, can do what the run file asks. Raises: ConfigError."""
    if device.type == "cpu" and config.optimizer["type"] == "Lion":
        raise ConfigError(
            "optimizer.type='Lion' is DeepSpeed's fused one, which runs on GPUs only; this run is on CPUs. "
            "Set optimizer.type to AdamW, Adam or SGD."
        )
    if device.type == "cuda" and config.precision == "bf16":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        raise ConfigError(
            "bf16.enabled=true needs a GPU that computes in bf16 (compute capability 8.0 or higher); "
            f"{torch.cuda.get_device_name(device)} has {capability}. Set fp16.enabled to true in place of "
            "bf16.enabled, or both to false for fp32."
        )


def check_optimizer(config: RunConfig) -> None:
    """Compile DeepSpeed's own optimizer, if the run file asks for it, as DeepSpeed would. Raises: ConfigError."""
    kind = config.optimizer["type"]
    if kind not in _COMPILED or config.optimizer["params"].get("torch_adam"):
        return
    try:
        get_accelerator().create_op_builder(_COMPILED[kind]).load()  # pyright: ignore[reportOptionalMemberAccess]
    except Exception as error:  # whatever DeepSpeed's checks, ninja or the compiler came to
        reason = str(error).strip().splitlines() or [""]
        others = "optimizer.type to AdamW and " if kind == "Lion" else ""
        raise ConfigError(
            f"optimizer.type={kind!r} is DeepSpeed's own, which is compiled at its first use, and that failed here: "
            f"{type(error).__name__}: {reason[0][:200]}. Install what it takes (a C++ compiler, Python's headers and "
            "ninja; for GPUs CUDA's nvcc, by CUDA_HOME), or set "
            f"{others}optimizer.params.torch_adam to true for torch's."
        ) from error


def precision_warning(precision: str, device: torch.device) -> str | None:
    """Return a warning if this CPU has no fast matrix products in the run's precision, else None."""
    if device.type != "cpu" or precision == "fp32":
        return None
    products: Any = torch.ops.mkldnn  # what torch itself asks before it hands a product to oneDNN
    is_fast = products._is_mkldnn_bf16_supported if precision == "bf16" else products._is_mkldnn_fp16_supported
    if is_fast():
        return None
    return (
        f"{precision} is many times slower than fp32 on this CPU, which lacks the instructions for it. For fp32 "
        f"set {precision}.enabled to false."
    )


def _deepspeed_config(config: RunConfig, on_gpu: bool) -> dict[str, Any]:
    """Return DeepSpeed's part of the run file with the settings that our engines need."""
    filled = dict(config.deepspeed)
    filled.setdefault("steps_per_print", NEVER)
    # On by default it waits for the device twice a micro batch (deepspeed 0.19.8, utils/timer.py, ThroughputTimer).
    timers = filled.get("timers", {})
    filled["timers"] = {**timers, "throughput": {"enabled": False, **timers.get("throughput", {})}}
    if on_gpu:  # a CPU computes and sends with the same cores, so nothing overlaps
        zero = filled.get("zero_optimization", {})
        overlaps = derive_overlap(zero, config.batch.data_parallel, config.parallel, config.path.paths_per_step)
        filled["zero_optimization"] = {**zero, "overlap_comm": overlaps}
    return filled
