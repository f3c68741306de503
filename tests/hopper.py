"""Compile the Triton kernels for Hopper on a machine without a GPU, and say what each takes: python -m tests.hopper

Prints a JSON list; run in a process where TRITON_INTERPRET is not set. Triton brings the assembler and cuobjdump.
"""

import json
import re
import subprocess
import tempfile
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from raptr_ds.model import attention_kernel, fused_attention
from raptr_ds.parallel import cross_entropy_kernel
from raptr_ds.parallel.dropout import keep_threshold

HOPPER = GPUTarget("cuda", 90, 32)
_POINTERS = {
    "logarithms": "fp32",
    "products": "fp32",
    "scales": "fp32",
    "largest": "fp32",
    "sums": "fp32",
    "of_target": "fp32",
    "targets": "i64",
    **dict.fromkeys(("first_key", "end_key", "first_query", "end_query", "rows", "columns"), "i32"),
    **dict.fromkeys(
        ("query", "key", "value", "gradient", "output", "by_query", "by_key", "by_value", "logits"), "bf16"
    ),
}
_FLOATS = {"scale", "factor", "keep_scale"}


def compiled(kernel: Any, constants: dict[str, Any], num_warps: int = 8, num_stages: int = 3) -> dict[str, Any]:
    """Return the registers of a thread, bytes of its stack (spilled registers) and of shared memory, instructions."""
    names = kernel.arg_names
    types = {
        name: "constexpr" if name in constants else f"*{_POINTERS[name]}" if name in _POINTERS else "i32"
        for name in names
    }
    types |= dict.fromkeys(_FLOATS & set(names), "fp32")
    aligned = [n for n, name in enumerate(names) if types[name][0] == "*" or name.endswith(("_batch", "_head", "_row"))]
    source = ASTSource(
        kernel,
        types,
        {(names.index(name),): value for name, value in constants.items()},
        {(number,): [["tt.divisibility", 16]] for number in aligned},
    )
    result = triton.compile(source, target=HOPPER, options={"num_warps": num_warps, "num_stages": num_stages})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        listed = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    used = re.search(r"REG:(\d+) STACK:(\d+)", listed.stdout)
    assert used is not None, listed.stdout
    return {
        "kernel": kernel.__name__,
        **constants,
        "registers": int(used[1]),
        "stack_bytes": int(used[2]),
        "shared_bytes": result.metadata.shared,
        "tensor_core_products": result.asm["ptx"].count("wgmma.mma_async"),
    }


def attention_kernels(width: int, has_ranges: bool, rate: float) -> list[dict[str, Any]]:
    """Compile attention in bf16, by the blocks that fused_attention chooses."""
    threshold = keep_threshold(rate) if rate else 0
    shared = {"D": width, "WIDTH": width, "RANGES": has_ranges, "THRESHOLD": threshold, "PRECISION": "tf32"}
    found = []
    for kernel, blocks in (
        (attention_kernel.attention_forward, fused_attention._forward_blocks(width, 2)),
        (attention_kernel.attention_backward_queries, fused_attention._query_blocks(width, 2)),
        (attention_kernel.attention_backward_keys, fused_attention._key_blocks(width, 2)),
    ):
        sizes = asdict(blocks)
        constants = {**shared, "QUERIES": sizes.pop("queries"), "KEYS": sizes.pop("keys")}
        found.append(compiled(kernel, constants, **sizes))
    return found


def main() -> None:
    """Compile what the shipped GPU run files use."""
    found = []
    for width, (has_ranges, rate) in product((64, 128), ((True, 0.0), (False, 0.1), (True, 0.1))):
        found += attention_kernels(width, has_ranges, rate)
    for kernel in (cross_entropy_kernel.cross_entropy_statistics, cross_entropy_kernel.cross_entropy_gradient):
        found.append(compiled(kernel, {"BLOCK": cross_entropy_kernel._BLOCK}))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
