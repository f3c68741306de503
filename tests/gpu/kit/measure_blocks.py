"""Measure our attention kernels at other sizes of blocks: which ones fused_attention.py should choose on this card.

python -m tests.gpu.kit.measure_blocks
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple
from typing import Any

import torch

from raptr_ds.model import fused_attention
from raptr_ds.model.fused_attention import _Blocks
from tests.gpu.kit.findings import Findings, one_line
from tests.gpu.kit.measure_attention import CASES, KERNELS, Case
from tests.gpu.kit.measured_device import DEVICE, IS_DRY_RUN, median_seconds

_FORWARD = (_Blocks(128, 64), _Blocks(128, 128, 8, 2), _Blocks(64, 64, 4), _Blocks(128, 64, 4), _Blocks(128, 32, 4, 4))
_QUERIES = (_Blocks(128, 64, 8, 2), _Blocks(64, 64, 4), _Blocks(128, 64), _Blocks(64, 32, 4, 4), _Blocks(64, 128))
_KEYS = (_Blocks(32, 128), _Blocks(64, 128, 8, 2), _Blocks(64, 64, 4), _Blocks(32, 64, 4), _Blocks(32, 128, 4, 2))


@contextmanager
def _chosen(name: str, blocks: _Blocks) -> Iterator[None]:
    """Let fused_attention choose these blocks for one of its kernels."""
    choose: Callable[..., Any] = getattr(fused_attention, name)
    setattr(fused_attention, name, lambda *_: blocks)
    try:
        yield
    finally:
        setattr(fused_attention, name, choose)


def measure(findings: Findings, case: Case, kernel: str) -> None:
    """Measure every size of every kernel on one case: the forward pass by itself, the others within both passes."""
    shape = case.shape
    query, key, value = (torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    gradient = torch.randn_like(query)
    attend = KERNELS[kernel](case)

    def forward() -> object:
        with torch.no_grad():
            return attend(query, key, value)

    def both() -> object:
        return torch.autograd.grad(attend(query, key, value), (query, key, value), gradient)

    for name, sizes, work in (
        ("_forward_blocks", _FORWARD, forward),
        ("_query_blocks", _QUERIES, both),
        ("_key_blocks", _KEYS, both),
    ):
        for blocks in sizes:
            title = f"{case.name}, {kernel}, {name.strip('_')} {astuple(blocks)}"
            try:
                with _chosen(name, blocks):
                    seconds = median_seconds(work, 10)
            except RuntimeError as error:  # too much shared memory, say
                findings.figure(title, f"not there: {one_line(str(error))[:90]}")
                continue
            findings.figure(title, f"{seconds * 1e3:.3f} ms", seconds=seconds)


def main() -> None:
    """Measure the shapes of the shipped run files, the one with its prefix, the other with dropout."""
    findings = Findings.of_environment()
    if not IS_DRY_RUN:
        for case, kernel in ((CASES[0], "ours"), (CASES[2], "ours, dropout 0.1")):
            with findings.part(f"blocks {case.name}"):
                measure(findings, case, kernel)
    findings.leave()


if __name__ == "__main__":
    main()
