"""The benchmark's report: one Markdown table, and what it was measured on."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

from raptr_ds.eval.step_benchmark import Measured, StepBenchmark, median_ratio

_MIB = 1 << 20


def step_report(result: StepBenchmark, device: torch.device, batch_origin: str) -> str:
    """Return the report as Markdown. batch_origin: where the tokens came from, for the heading."""
    model, batch, full = result.config.model, result.config.batch, result.paths[0]
    twin = "" if result.twin is None else f", Hugging Face {result.losses[1]:.6f}"
    lines = [
        f"- model: {model.architecture}, {model.num_layers} layers of width {model.hidden_size}, "
        f"{model.num_attention_heads} heads, feed-forward {model.ffn_hidden_size}, vocabulary {model.vocab_size:,}, "
        f"{result.num_parameters / 1e6:.1f}M parameters, dropout {model.hidden_dropout}/{model.attention_dropout}",
        f"- batch: {batch.global_batch} sequences of {model.seq_length} tokens in micro batches of "
        f"{batch.micro_batch}, {result.num_predictions} predicted positions; {batch_origin}",
        f"- precision {result.config.precision}, ZeRO {result.config.zero_stage}; one process on {_machine(device)}",
        f"- loss of the batch before the first step: raptr_ds {result.losses[0]:.6f}{twin}",
        f"- {len(full.seconds)} rounds, one step of each row in every round; medians, ratios within a round; "
        f"{result.clock} clock",
        "",
        "| step | path length | seconds | spread | speed-up over full path | by executed FLOPs | reached "
        "| GFLOP/s | step memory, MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_path_row(measured, full) for measured in result.paths]
    if result.twin is not None:
        lines.append(_path_row(result.twin, full))
    lines += ["", *_conclusions(result)]
    return "\n".join(lines) + "\n"


def _path_row(measured: Measured, full: Measured) -> str:
    ideal = full.flops / measured.flops
    seconds = median(measured.seconds)
    speed_up = median_ratio(full.seconds, measured.seconds)
    spread = f"{min(measured.seconds) / seconds - 1:+.0%} {max(measured.seconds) / seconds - 1:+.0%}"
    memory = median(measured.memory_bytes) / _MIB
    return (
        f"| {measured.name} | {measured.path_length} | {seconds:.4f} | {spread} | {speed_up:.3f} | {ideal:.3f} | "
        f"{speed_up / ideal:.1%} | {measured.flops / seconds / 1e9:.1f} | {memory:.0f} |"
    )


def _conclusions(result: StepBenchmark) -> list[str]:
    full = result.paths[0]
    waits = [wait for measured in result.paths for wait in measured.agreement_seconds]
    share = median(wait / seconds for wait, seconds in zip(full.agreement_seconds, full.seconds, strict=True))
    lines = [
        f"- path agreement keeps a step waiting {median(waits) * 1e6:.0f} us (median; largest {max(waits) * 1e6:.0f}): "
        f"{share:.4%} of a full step",
    ]
    if result.twin is None:
        lines.append(f"- no Hugging Face row: {result.no_twin}")
    else:
        ratio = median_ratio(result.twin.seconds, full.seconds)
        lines.append(f"- full path against Hugging Face: {ratio:.2f}x as fast")
    lines.append(f"- peak memory of the process, all rows together: {result.peak_bytes / _MIB:,.0f} MiB")
    return lines


def _machine(device: torch.device) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers"))
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({packages})"
    return f"{_cpu_name()}, {torch.get_num_threads()} of {os.cpu_count()} threads ({packages})"


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
