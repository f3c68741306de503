"""Prints an element of the product of two matrices of ones in bf16, of 16 columns and rows, by Triton's interpreter."""

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
import triton.language as tl


@triton.jit
def _product(ones, result):
    at = tl.arange(0, 16)
    place = at[:, None] * 16 + at[None, :]
    factor = tl.load(ones + place)
    tl.store(result + place, tl.dot(factor, factor))


result = torch.empty(16, 16)
kernel: Any = _product
kernel[(1,)](torch.ones(16, 16, dtype=torch.bfloat16), result)
print(result[0, 0].item())
