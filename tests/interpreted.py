"""Triton's kernels on CPU tensors, by its interpreter: import this before a module of kernels.

tests/conftest.py sets TRITON_INTERPRET. Its interpreter (triton 3.7.1, runtime/interpreter.py, create_dot) multiplies
the bit patterns of bf16 as if they were integers; here they become fp32 first, which is what tensor cores compute.
tests/upstream has a test that fails when Triton does so itself.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton import knobs
from triton.runtime import interpreter

assert knobs.runtime.interpret, "TRITON_INTERPRET was not set when Triton was imported"

_create_dot = interpreter.InterpreterBuilder.create_dot


def _in_fp32(operand: Any) -> Any:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    bits = np.left_shift(operand.data.astype(np.uint32), 16)
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    return _create_dot(self, _in_fp32(a), _in_fp32(b), *rest)


interpreter.InterpreterBuilder.create_dot = _dot  # type: ignore[method-assign]
