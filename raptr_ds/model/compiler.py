"""Whether torch.compile has what it needs here, and which flag it needs: it writes C++ on CPUs, Triton on GPUs."""

from functools import cache

from raptr_ds.parallel.triton_check import triton_obstacle


@cache
def missing_compiler(device_type: str = "cpu") -> str | None:
    """Return why blocks cannot be compiled on this machine for a kind of device, None where they can."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # slow to import, and needed by few
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()  # on GPUs, too: Triton's launchers are compiled
    except InvalidCxxCompiler as error:
        return str(error).strip().splitlines()[0]
    return triton_obstacle() if device_type == "cuda" else None


@cache
def let_integers_wrap() -> None:
    """Make the C++ that torch's inductor compiles define what an overflowing product of signed integers is.

    Dropout hashes by 32-bit products that wrap, as they do in torch's own operations and in Triton. In C++ they are
    undefined without -fwrapv: g++ 12.2 drops stores from what torch 2.13.0 writes, and what 2.11.0 writes crashes.
    Inductor has no setting for flags (_inductor/cpp_builder.py), so the function that lists them gets one more.
    """
    from torch._inductor import cpp_builder

    flags_of = cpp_builder._get_ffast_math_flags
    cpp_builder._get_ffast_math_flags = lambda: [*flags_of(), "fwrapv"]
