"""Whether torch.compile has what it needs here: it writes C++ on CPUs and builds its launchers with it on GPUs."""

from functools import cache


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
