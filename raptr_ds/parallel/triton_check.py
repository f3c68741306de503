"""Whether Triton can run kernels on this machine's GPUs."""

from functools import cache
from importlib.util import find_spec


@cache
def triton_obstacle() -> str | None:
    """Return why Triton cannot launch kernels on this machine's GPUs, None if it can.

    Its driver is a C extension that Triton compiles here (triton/backends/nvidia/driver.py, CudaUtils), so the question
    takes a second where it is not in Triton's cache.
    """
    if find_spec("triton") is None:
        return "Triton is not installed (it comes with torch's builds for GPUs; pip install triton)"
    from triton.runtime import driver

    try:
        driver.active.get_current_target()
    except Exception as error:  # whatever the compiler, the linker or the import of the result came to
        reason = str(error).strip().splitlines() or [""]
        return (
            f"Triton cannot build its driver, which takes a C compiler and Python's headers (Debian: apt-get install "
            f"gcc python3-dev): {type(error).__name__}: {reason[0][:200]}"
        )
    return None


def is_interpreted() -> bool:
    """Return whether Triton interprets its kernels, on the CPU (TRITON_INTERPRET=1)."""
    if find_spec("triton") is None:
        return False
    from triton import knobs

    return knobs.runtime.interpret
