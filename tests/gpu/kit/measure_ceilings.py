"""Measure what nothing on this device can pass: bytes copied, and matrix products of the models' shapes in bf16.

python -m tests.gpu.kit.measure_ceilings
"""

from collections.abc import Iterator

import torch
from torch.nn.functional import linear

from raptr_ds.config.run import RunConfig
from raptr_ds.data.loader import predictions_per_sequence
from tests.gpu.kit.findings import Findings
from tests.gpu.kit.measured_device import DEVICE, IS_DRY_RUN, median_seconds, rate_text
from tests.gpu.kit.measured_models import MODELS

_COPIED_BYTES = 1 << 20 if IS_DRY_RUN else 1 << 31  # far more than the caches hold
_SQUARE = 128 if IS_DRY_RUN else 8192


def measure_copy(findings: Findings) -> None:
    """Measure a copy inside the device's memory."""
    source = torch.zeros(_COPIED_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    rate = 2 * _COPIED_BYTES / median_seconds(lambda: target.copy_(source), repetitions=10)
    findings.figure("copy", f"{rate / 1e12:.3g} TB/s, bytes read and written", bytes_per_second=rate)


def products(config: RunConfig) -> Iterator[tuple[str, int, int, int]]:
    """Yield the matrix products of a layer and the head on one micro batch: name, rows m, columns n, inner size k."""
    model, tokens = config.model, config.batch.micro_batch * config.model.seq_length
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    inner = 2 * ffn if model.activation == "swiglu" else ffn
    shapes = {"qkv": (3 * hidden, hidden), "output": (hidden, hidden), "expand": (inner, hidden)}
    shapes["contract"] = (hidden, ffn)
    for name, (outputs, inputs) in shapes.items():
        yield name, tokens, outputs, inputs
        yield f"{name}, weight gradient", outputs, inputs, tokens
    assert model.vocab_size, "not known"
    yield "logits", round(predictions_per_sequence(config) * config.batch.micro_batch), model.vocab_size, hidden


def measure_product(findings: Findings, name: str, m: int, n: int, k: int) -> None:
    """Measure (m, k) by the transpose of (n, k) in bf16, of random numbers: zeros draw less power and run faster."""
    left = torch.randn(m, k, device=DEVICE, dtype=torch.bfloat16)
    right = torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16)
    rate = 2 * m * n * k / median_seconds(lambda: linear(left, right))
    findings.figure(f"product {name}", f"{m} x {n} x {k}: {rate_text(rate)}", flops_per_second=rate)


def main() -> None:
    """Measure, and write findings."""
    findings = Findings.of_environment()
    with findings.part("copy"):
        measure_copy(findings)
    with findings.part("product square"):
        measure_product(findings, "square", _SQUARE, _SQUARE, _SQUARE)
    for name, model in MODELS.items():
        with findings.part(f"products of {name}"):
            for product, m, n, k in products(model.config()):
                measure_product(findings, f"{name} {product}", m, n, k)
    findings.leave()


if __name__ == "__main__":
    main()
