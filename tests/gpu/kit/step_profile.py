"""A profile of one training step: kinds of kernels, the largest kernels, and what the host does."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

from tests.gpu.kit.findings import Findings
from tests.gpu.kit.kernel_kinds import Kernel, by_kind, idle_share, kind_lines
from tests.gpu.kit.measured_device import DEVICE

_KINDS_IN_SUMMARY = 6


def profile_step(step: Callable[[], float], title: str, findings: Findings) -> str:
    """Run one step, which returns its seconds, under torch's profiler; return a report and write a finding of it.

    On a GPU its kernels count; in a dry run the CPU's operations stand for them.
    """
    is_gpu = DEVICE.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
    with profile(activities=activities) as recorded:
        milliseconds = step() * 1e3
    averages = recorded.key_averages()
    kernels = []
    for event in averages:
        microseconds = event.self_device_time_total if is_gpu else event.self_cpu_time_total
        if microseconds > 0 and is_gpu == ("cuda" in str(event.device_type).lower()):
            kernels.append(Kernel(event.key, event.count, microseconds / 1e3))
    if not kernels:
        findings.check(False, f"{title} profile", "the profiler saw no kernel")
        return ""
    sums = by_kind(kernels)
    top = "; ".join(f"{kind} {spent:.0f} ms" for kind, spent in list(sums.items())[:_KINDS_IN_SUMMARY])
    launches, idle = sum(kernel.count for kernel in kernels), idle_share(kernels, milliseconds)
    findings.figure(f"{title} profile", f"{launches} launches, idle {idle:.0%}; {top}", milliseconds=sums)
    order = "self_cuda_time_total" if is_gpu else "self_cpu_time_total"
    return "\n".join(
        [
            f"## {title}: one full step, {milliseconds:.1f} ms with the profiler on",
            *kind_lines(kernels, milliseconds),
            averages.table(sort_by=order, row_limit=45, max_name_column_width=95),
            "### by the host's time",
            averages.table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=60),
            "",
        ]
    )
