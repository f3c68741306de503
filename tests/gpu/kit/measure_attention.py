"""Measure attention alone: kernels that could compute it, on the models' shapes and masks, and what its dropout costs.

python -m tests.gpu.kit.measure_attention

Whether they are right, tests/gpu checks; here only time counts. The share of the peak is that of the project's own
count of FLOPs, over the whole T x T matrix, so that a kernel that skips masked blocks can pass what products reach.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from raptr_ds.model.key_ranges import KeyRanges
from raptr_ds.parallel.dropout import LayerDropout, attention_hashes, attention_keep_mask
from tests.attention_cases import ranges_of
from tests.dropout_masks import streams_of
from tests.gpu.kit.findings import Findings, one_line
from tests.gpu.kit.measured_device import DEVICE, IS_DRY_RUN, median_seconds, rate_text

_REPETITIONS = 10
_DROPOUT = 0.1


@dataclass(frozen=True)
class Case:
    """A shape of the models, (batch, heads, length, width) of a head, with its mask: prefix, padding or none."""

    name: str
    shape: tuple[int, int, int, int]
    mask: str

    def lengths(self) -> torch.Tensor:
        """Return a length for each sequence, (batch,): of the prefix, or up to the padding."""
        batch, _, length, _ = self.shape
        return torch.linspace(0.4, 0.95, batch, device=DEVICE).mul(length).long()

    def seen(self) -> torch.Tensor | None:
        """Return whether a query sees a key, (batch, 1, length or 1, length); None where all see all."""
        if self.mask == "none":
            return None
        position = torch.arange(self.shape[2], device=DEVICE)
        below = position < self.lengths()[:, None]
        if self.mask == "padding":
            return below[:, None, None, :]
        return ((position <= position[:, None]) | below[:, None, :])[:, None]

    def ranges(self) -> KeyRanges | None:
        """Return the same as our kernel takes it."""
        if self.mask == "none":
            return None
        position = torch.arange(self.shape[2], device=DEVICE)
        end = self.lengths()[:, None].expand(-1, self.shape[2])
        end = torch.maximum(position + 1, end) if self.mask == "prefix" else end.contiguous()
        return ranges_of(torch.zeros_like(end), end)

    def dropout(self) -> LayerDropout:
        """Return the masks of a layer for these sequences."""
        return streams_of(7, 11, torch.arange(self.shape[0], device=DEVICE)).of_layer(3)


CASES = (
    Case("ul2_1b, 18 heads of 128", (8, 18, 1024, 128), "prefix"),
    Case("ul2_1b, 24 heads of 96", (8, 24, 1024, 96), "prefix"),
    Case("bert_base", (32, 12, 512, 64), "none"),
    Case("bert_base", (32, 12, 512, 64), "padding"),
)

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _sdpa(*backends: SDPBackend) -> Callable[[Case], Attention]:
    """Return torch's attention by one of these backends, all where none is named, with a mask that is added."""

    def make(case: Case) -> Attention:
        seen = case.seen()
        added = None
        if seen is not None:
            added = torch.zeros(seen.shape, dtype=torch.bfloat16, device=DEVICE).masked_fill_(~seen, -torch.inf)

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(list(backends)) if backends else nullcontext():
                return scaled_dot_product_attention(query, key, value, attn_mask=added)

        return attend

    return make


def _flex(case: Case) -> Attention:
    """Return FlexAttention, compiled, with a mask by blocks."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # a case is a graph or two, and dynamo gives up after eight of one function
    batch, _, length, _ = case.shape
    lengths = case.lengths()

    def sees(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        below = k < lengths[b]
        return below if case.mask == "padding" else (k <= q) | below

    blocks = None if case.mask == "none" else create_block_mask(sees, batch, None, length, length, device=str(DEVICE))
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return compiled(query, key, value, block_mask=blocks)

    return attend


def _ours(rate: float) -> Callable[[Case], Attention]:
    """Return our kernel with dropout at a rate; its hashes of rows and columns are part of the time."""

    def make(case: Case) -> Attention:
        from raptr_ds.model.fused_attention import fused_attention

        ranges, masks, heads = case.ranges(), case.dropout(), torch.arange(case.shape[1], device=DEVICE)

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            hashes = attention_hashes(masks, query.shape[2], heads=heads) if rate else None
            return fused_attention(query, key, value, ranges, hashes, rate).transpose(1, 2)

        return attend

    return make


# Each makes a case's attention; one that cannot compute it raises, when made or when called.
KERNELS: dict[str, Callable[[Case], Attention]] = {
    "torch's choice": _sdpa(),
    "cuDNN": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "flash": _sdpa(SDPBackend.FLASH_ATTENTION),
    "memory-efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "FlexAttention": _flex,
    "ours": _ours(0.0),
    "ours, dropout 0.1": _ours(_DROPOUT),
}
_NOT_DRY = {"FlexAttention", "ours", "ours, dropout 0.1"}  # compiling takes long, and kernels are for GPUs


def measure_kernel(findings: Findings, case: Case, kernel: str) -> None:
    """Measure one kernel on one case, forward and with its backward pass; where it cannot compute it, write why."""
    name = f"attention {case.name}, mask {case.mask}, {kernel}"
    batch, heads, length, width = case.shape
    query, key, value = (
        torch.randn(batch, heads, length, width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    gradient = torch.randn_like(query)
    try:
        attend = KERNELS[kernel](case)
        with torch.no_grad():
            forward = median_seconds(lambda: attend(query, key, value), _REPETITIONS)
        both = median_seconds(
            lambda: torch.autograd.grad(attend(query, key, value), (query, key, value), gradient), _REPETITIONS
        )
    except RuntimeError as error:
        findings.figure(name, f"not for this case: {one_line(str(error))[:90]}")
        return
    flops = 4 * batch * heads * length**2 * width
    text = f"forward {forward * 1e3:.3f} ms, {rate_text(flops / forward)}; both {both * 1e3:.3f} ms, "
    findings.figure(name, text + rate_text(3 * flops / both), forward_seconds=forward, seconds=both)


def measure_dropout_mask(findings: Findings, case: Case) -> None:
    """Measure the mask of attention's dropout where it is spelled out, as a matrix of its own."""
    batch, heads, length, _ = case.shape
    masks, rows = case.dropout(), torch.arange(heads, device=DEVICE)
    seconds = median_seconds(lambda: attention_keep_mask(_DROPOUT, masks, length, heads=rows), repetitions=5)
    rate = batch * heads * length**2 / seconds
    findings.figure(f"attention {case.name}, dropout's mask", f"{seconds * 1e3:.2f} ms, {rate / 1e9:.3g} G elements/s")


def main() -> None:
    """Measure every kernel on every case."""
    findings = Findings.of_environment()
    cases = [Case(case.name, (1, 2, 64, 32), case.mask) for case in CASES] if IS_DRY_RUN else CASES
    for case in cases:
        for kernel in KERNELS:
            if IS_DRY_RUN and kernel in _NOT_DRY:
                continue
            with findings.part(f"attention {case.name} {kernel}"):
                measure_kernel(findings, case, kernel)
    with findings.part("dropout's mask"):
        measure_dropout_mask(findings, cases[-1])
    findings.leave()


if __name__ == "__main__":
    main()
