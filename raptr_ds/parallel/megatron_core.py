"""What we use of megatron-core, imported without compiling what we do not.

Importing megatron.core 0.16.1 hands its fused functions to torch.compile (megatron/core/jit.py), which loads torch's
inductor: 2 s of CPU in every process, before a user sees a line. None of these functions is among those below. Where
megatron.core is imported before this module (compiled_fusions.py, for the benchmark) it stays as it is.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def _without_compiler() -> Iterator[None]:
    def leave(function: Callable[..., Any] | None = None, **_: Any) -> Any:
        return leave if function is None else function

    compiler = torch.compile
    torch.compile = leave  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiler


with _without_compiler():
    from megatron.core import parallel_state
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        copy_to_tensor_model_parallel_region,
        reduce_from_tensor_model_parallel_region,
    )

__all__ = [
    "ColumnParallelLinear",
    "ModelParallelConfig",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "copy_to_tensor_model_parallel_region",
    "parallel_state",
    "reduce_from_tensor_model_parallel_region",
]
