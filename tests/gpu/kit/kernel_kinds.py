"""Kernels of a profile by kind: where a step's time goes, in ten lines instead of a hundred."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

# The first pattern found in a kernel's name, in lower case, counts. Names that torch.compile gives hold those of the
# operations inside, so they stand before the operations; flex attention's templates are attention all the same.
_KINDS = (
    ("attention", r"flex_attention|flexattention"),
    ("compiled elementwise and norms", r"^triton_(poi|per|red|for)_"),
    ("attention", r"fmha|flash|cudnn_generated_fort|sdpa|attention"),
    ("cross-entropy", r"cross_entropy|nll_loss|log_softmax"),
    ("matrix products", r"gemm|nvjet|cublas|xmma|splitk|cutlass|^triton_tem|aten::(addmm|mm|bmm|linear)$"),
    ("optimizer", r"multi_tensor_apply|adam"),
    ("norms", r"layer_?norm|rms_?norm|gammabeta"),
    ("other compiled", r"triton"),
    ("concatenation, copies, casts", r"catarray|copy|memcpy|memset"),
    ("softmax", r"softmax"),
    ("reductions", r"reduce"),
    ("indexing", r"index|embedding|gather|scatter|sort|radix"),
    ("elementwise", r"elementwise"),
)


@dataclass(frozen=True)
class Kernel:
    """All launches of one kernel in a step: their number, and the milliseconds that they took together."""

    name: str
    count: int
    milliseconds: float


def kind_of(name: str) -> str:
    """Return the kind of a kernel by its name; `other` where no pattern fits."""
    lowered = name.lower()
    return next((kind for kind, pattern in _KINDS if re.search(pattern, lowered)), "other")


def by_kind(kernels: Iterable[Kernel]) -> dict[str, float]:
    """Return the milliseconds of each kind, the largest first."""
    sums: dict[str, float] = {}
    for kernel in kernels:
        kind = kind_of(kernel.name)
        sums[kind] = sums.get(kind, 0.0) + kernel.milliseconds
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def idle_share(kernels: Iterable[Kernel], step_milliseconds: float) -> float:
    """Return the share of a step in which no kernel runs; the profiler itself adds to it."""
    return 1.0 - sum(kernel.milliseconds for kernel in kernels) / step_milliseconds


def kind_lines(kernels: list[Kernel], step_milliseconds: float) -> list[str]:
    """Return a table of the kinds for people, below a line on the whole step."""
    busy = sum(kernel.milliseconds for kernel in kernels)
    launches = sum(kernel.count for kernel in kernels)
    idle = idle_share(kernels, step_milliseconds)
    lines = [f"kernels take {busy:.1f} ms in {launches} launches; the device is idle {idle:.1%} of the step"]
    for kind, milliseconds in by_kind(kernels).items():
        lines.append(f"{kind:32s} {milliseconds:9.2f} ms {milliseconds / busy:6.1%}")
    return lines
