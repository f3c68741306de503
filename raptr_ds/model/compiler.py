"""Whether torch.compile has what it needs here, and what it is told: it writes C++ on CPUs, and launchers on GPUs."""

from functools import cache

import torch


@cache
def missing_compiler() -> str | None:
    """Return why blocks cannot be compiled on this machine, None where they can."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # slow to import, and needed by few
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        return str(error).strip().splitlines()[0]
    return None


def compiler_options() -> dict[str, int]:
    """Return torch.compile's options: on a CPU with AVX-512 its vectors are 256 bits wide nevertheless.

    g++ 12.2 (Debian 12's) drops masked stores of 512 bits from what torch 2.13.0 writes (_inductor/codegen/cpp.py):
    where a row is no multiple of 16 elements its end may keep what memory held before, silently. g++ 11 does not.
    tests/upstream has a reproduction.
    """
    return {"cpp.simdlen": 256} if torch.cpu.get_capabilities().get("avx512_f") else {}
