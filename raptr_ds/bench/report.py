"""The benchmark's report: what was measured, a Markdown table of all rows, and which aims are reached."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from raptr_ds.bench.preparation import PreparationTimes
from raptr_ds.bench.samples import SAMPLES, Measured, MedianRatio
from raptr_ds.bench.steps import StepBenchmark
from raptr_ds.config.run import RunConfig
from raptr_ds.markdown import markdown_table

_MIB = 1 << 20
# The aims: speed relative to Hugging Face, share of the speed-up by executed FLOPs, shares of a full step.
FASTER_THAN_HUGGING_FACE, FASTER_THAN_COMPILED, REACHED_ALONE, REACHED_TOGETHER = 1.2, 1.3, 0.97, 0.95
MOST_AGREEMENT, MOST_LOADER_STALL = 0.001, 0.01


def describe(config: RunConfig, result: StepBenchmark, device: torch.device, batch_origin: str) -> list[str]:
    """Return what was measured, as a Markdown list. batch_origin: where the tokens came from."""
    model, batch = config.model, config.batch
    rows = (result.paths[0], *result.others)
    is_compiled = config.compiles(device.type == "cuda")
    losses = ", ".join(f"{row.name} {row.loss:.6f}" for row in rows if row.loss is not None)
    return [
        f"- model: {model.architecture}, {model.num_layers} layers of width {model.hidden_size}, "
        f"{model.num_attention_heads} heads, feed-forward {model.ffn_hidden_size}, vocabulary {model.vocab_size:,}, "
        f"{result.num_parameters / 1e6:.1f}M parameters, dropout {model.hidden_dropout}/{model.attention_dropout}",
        f"- batch: {batch.global_batch} sequences of {model.seq_length} tokens in micro batches of "
        f"{batch.micro_batch}, {result.num_predictions} predicted positions; {batch_origin}",
        f"- precision {config.precision}, ZeRO {config.zero_stage}, compiled: {str(is_compiled).lower()}; "
        f"{_machine(device)}",
        f"- loss of the batch before the first step: {losses}",
        f"- {result.options.repetitions} rounds, {_taking_turns(result)}, with their 95% intervals; "
        f"{result.options.clock} clock" + ("" if result.options.clock == "wall" else ", of the busiest rank"),
    ]


def _taking_turns(result: StepBenchmark) -> str:
    if result.why_apart is None:
        return "in turns: one step of each row in every round; medians, ratios within a round"
    return (
        f"one stack after another ({result.why_apart}), our paths in turns; medians and their ratios, of our paths "
        "within a round"
    )


def rows_of(result: StepBenchmark) -> list[dict[str, Any]]:
    """Return the rows as JSON-able values, each with its medians and its ratios against our full path."""
    full, rows = result.paths[0], []
    for row in (*result.paths, *result.others):
        by_flops = full.flops / row.flops
        found: dict[str, Any] = {"median_seconds": None, "speed_up": None, "by_flops": by_flops, "reached": None}
        if row.seconds:
            found["median_seconds"] = median(row.seconds)
        if row.seconds and full.seconds:
            reached = _ratio(result, full, row, by_flops)
            found.update(speed_up=reached.value * by_flops, reached=asdict(reached))
        rows.append({**asdict(row), **found})
    return rows


def row_without_memory(full: Mapping[str, Any], layout: str) -> dict[str, Any]:
    """Return the row of a layout whose processes ran out of memory. full: our full path's row in any layout."""
    empty = {name: [] for name in SAMPLES}
    unknown = dict.fromkeys(("loss", "predicted_seconds", "median_seconds", "speed_up", "reached"))
    return {**full, **empty, **unknown, "layout": layout, "out_of_memory": "out of memory"}


def _ratio(result: StepBenchmark, slower: Measured, faster: Measured, unit: float = 1.0) -> MedianRatio:
    """Return how many times as fast a row is as another, within rounds if they share them."""
    is_ours = slower.name == faster.name
    of = MedianRatio.of if is_ours or result.why_apart is None else MedianRatio.of_separate
    return of(slower.seconds, faster.seconds, unit)


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the Markdown table of rows, of one layout or several."""
    lines = []
    for row in rows:
        seconds, samples = row["median_seconds"], row["seconds"]
        by_flops = f"{row['by_flops']:.3f}"
        first = [row["name"], row["layout"], f"{row['path_length']:g}"]
        if row["out_of_memory"] is not None:
            lines.append([*first, row["out_of_memory"], "", "", by_flops, "", "", "", ""])
            continue
        lines.append(
            [
                *first,
                f"{seconds:.4f}",
                f"{min(samples) / seconds - 1:+.0%} {max(samples) / seconds - 1:+.0%}",
                "" if row["speed_up"] is None else f"{row['speed_up']:.3f}",
                by_flops,
                "" if row["reached"] is None else _with_interval(MedianRatio(**row["reached"])),
                f"{row['flops'] / seconds / 1e9:.1f}",
                f"{median(row['memory_bytes']) / _MIB:.0f}",
                "" if row["predicted_seconds"] is None else f"{row['predicted_seconds']:.4f}",
            ]
        )
    head = ["step", "layout", "path length", "seconds", "spread", "speed-up over our full path", "by executed FLOPs"]
    return markdown_table([*head, "reached", "GFLOP/s", "step memory, MiB", "predicted, s"], lines)


def conclusions(result: StepBenchmark, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return which aims are reached, each with its number. rows: those of all layouts."""
    full = result.paths[0]
    lines = _waits(result) + _against_others(result) if full.seconds else []
    lines += [f"- no row for {name}: {reason}" for name, reason in result.absent.items()]
    for layout in dict.fromkeys(row["layout"] for row in rows):
        ours = [row for row in rows if row["layout"] == layout and row["name"] == full.name and row["reached"]]
        reached = min((MedianRatio(**row["reached"]) for row in ours[1:]), key=lambda ratio: ratio.value, default=None)
        aim = REACHED_ALONE if layout == "one process" else REACHED_TOGETHER
        if reached is not None:
            lines.append(
                f"- {layout}: shorter paths reach {_with_interval(reached)} or more; aim {aim:.0%}: "
                f"{reached.against(aim)}"
            )
    peaks = {row.name: max(row.peak_bytes) for row in (*result.others, *result.paths[::-1]) if row.peak_bytes}
    if result.why_apart is None:
        return [*lines, f"- peak memory of the process, all rows together: {max(peaks.values()) / _MIB:,.0f} MiB"]
    each = ", ".join(f"{name} {peak / _MIB:,.0f} MiB" for name, peak in reversed(peaks.items()))
    lines.append(f"- peak memory of the process: {each}")
    return lines


def _waits(result: StepBenchmark) -> list[str]:
    """Return how long our full path waits for agreement and loader."""
    full = result.paths[0]
    agreement = _share(full.agreement_seconds, full)
    waits = [wait for measured in result.paths for wait in measured.agreement_seconds]
    lines = [
        f"- a step waits for path agreement {median(waits) * 1e6:.0f} us (median; largest {max(waits) * 1e6:.0f}): "
        f"{agreement:.4%} of a full step; aim {MOST_AGREEMENT:.1%}: {_verdict(agreement <= MOST_AGREEMENT)}",
    ]
    if result.has_loader:
        stall = _share(full.loader_seconds, full)
        lines.append(
            f"- a step waits for the loader {stall:.4%} of its time; aim {MOST_LOADER_STALL:.0%}: "
            f"{_verdict(stall <= MOST_LOADER_STALL)}"
        )
    return lines


def _against_others(result: StepBenchmark) -> list[str]:
    """Return how our full path compares with other stacks, and its memory with the plan."""
    full, lines = result.paths[0], []
    for other in (row for row in result.others if row.seconds):
        ratio = _ratio(result, other, full)
        verdict = ""
        if "Hugging Face" in other.name:
            aim = FASTER_THAN_COMPILED if result.options.compile_others else FASTER_THAN_HUGGING_FACE
            verdict = f"; aim {aim}: {ratio.against(aim)}"
        lines.append(
            f"- our full path against {other.name}: {ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f}) x as fast"
            f"{verdict}"
        )
    if result.planned_bytes is not None:
        peak = max(full.peak_bytes)
        lines.append(
            f"- our full path's peak in torch's allocator: {peak / _MIB:,.0f} MiB; by the memory plan "
            f"{result.planned_bytes / _MIB:,.0f} MiB, {result.planned_bytes / peak - 1:+.1%}"
        )
    return lines


def preparation_lines(times: PreparationTimes) -> list[str]:
    """Return the speeds of tokenizing and indexing."""
    speeds = {
        "raptr_ds": (times.our_tokens, times.ours),
        "megatron's recipe": (times.megatron_tokens, times.megatron),
    }
    listed = ", ".join(
        f"{name} {times.text_bytes / median(seconds) / _MIB:.2f} MiB/s ({tokens:,} tokens)"
        for name, (tokens, seconds) in speeds.items()
    )
    ratio = MedianRatio.of(times.megatron, times.ours)
    return [f"- tokenizing and indexing on one core: {listed}; {ratio.value:.2f}x as fast; aim 1: {ratio.against(1.0)}"]


def _with_interval(ratio: MedianRatio) -> str:
    is_itself = ratio.low == ratio.value == ratio.high
    return f"{ratio.value:.1%}" + ("" if is_itself else f" ({ratio.low:.1%} to {ratio.high:.1%})")


def _share(waits: Sequence[float], measured: Measured) -> float:
    return median(wait / seconds for wait, seconds in zip(waits, measured.seconds, strict=True))


def _verdict(is_reached: bool) -> str:
    return "reached" if is_reached else "missed"


def _machine(device: torch.device) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers", "megatron-core"))
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({packages})"
    return f"{_cpu_name()}, {torch.get_num_threads()} of {os.cpu_count()} threads a process ({packages})"


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
