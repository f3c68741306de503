"""What a run prints before its first step, and the device it is measured against."""

from pathlib import Path

import torch

from raptr_ds.config.path_sections import ScheduledSection
from raptr_ds.config.run import RunConfig
from raptr_ds.engine.build import attention_of, compilation_of, precision_warning
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.paths import PathMethod
from raptr_ds.paths.cost import num_parameters
from raptr_ds.runtime.method import left_out_layers, micro_batches_of
from raptr_ds.runtime.metrics_file import METRICS, read_metrics
from raptr_ds.runtime.progress import Progress, build_progress
from raptr_ds.runtime.utilization import peak_flops


def introduce(config: RunConfig, groups: ProcessGroups, method: PathMethod, launcher: str) -> Progress:
    """Print what the run is, on rank 0 alone; return what prints from now on."""
    attention, compilation = attention_of(config, groups), compilation_of(config, groups)  # collective
    if groups.rank:
        return Progress()
    topology, model, path = groups.topology, config.model, config.path
    alone = topology.data == 1 and config.zero_stage in (1, 2)
    zero = f"{config.zero_stage} (run as 0: no other rank to share with)" if alone else config.zero_stage
    slow = precision_warning(config.precision, groups.device)
    lines = [
        f"{model.architecture}: {model.num_layers} layers x {model.hidden_size}, {num_parameters(model) / 1e6:.1f} M "
        f"parameters, vocabulary {model.vocab_size}, {config.precision}",
        f"layout: tensor {topology.tensor}{' with its sequences split' if groups.sequence_parallel else ''} x "
        f"pipeline {topology.pipeline} x data {topology.data}, ZeRO {zero}, "
        f"batch {config.batch.global_batch} = {config.batch.micro_batch} x {config.batch.accumulation} accumulated x "
        f"{config.batch.data_parallel}",
        f"attention: {attention.description}; layers {'' if compilation.is_compiled else 'not '}compiled",
        f"paths: {path.method}" + (f" {path.schedule} ({path.split})" if isinstance(path, ScheduledSection) else ""),
        *(f"  derived: {line}" for line in config.derived),
        *(f"warning: {line}" for line in (*config.warnings, attention.warning, compilation.warning, slow) if line),
        *left_out_layers(method),
    ]
    if config.parallel.micro_batches:
        lines.append(f"micro batches of the phases: {', '.join(map(str, micro_batches_of(config, method)))} sequences")
    progress = build_progress(config.log.progress, launcher=launcher)
    for line in lines:
        progress.say(line)
    return progress


def standing(config: RunConfig, folder: Path, step: int, is_own: bool) -> str:
    """Return what a restored run prints: that it continues, or that nothing is left to do, and how it ended.

    is_own: what lies in its folder is of this run.
    """
    if step < config.train.steps:
        return f"continuing after step {step}"
    evaluation = read_metrics(folder / METRICS).last_evaluation(config.model.num_layers, step) if is_own else None
    loss = "" if evaluation is None else f"; held-out loss {evaluation[1]:.4f} after step {evaluation[0]}"
    return (
        f"this run is complete: {step} of {config.train.steps} steps are trained{loss}. Raise "
        "raptr_ds.train.steps to train on, or set another raptr_ds.train.save to start afresh."
    )


def device_peak(config: RunConfig, groups: ProcessGroups) -> float | None:
    """Return the FLOP/s of one device in the run's precision, None where they are not known."""
    if config.log.peak_tflops is not None:
        return config.log.peak_tflops * 1e12
    name = torch.cuda.get_device_name(groups.device) if groups.device.type == "cuda" else None
    return peak_flops(name, config.precision)
