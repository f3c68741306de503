"""What we use of megatron-core, imported without compiling what we do not.

Importing megatron.core 0.16.1 hands its fused functions to torch.compile (megatron/core/jit.py); see uncompiled.py.
None of these functions is among those below. Where megatron.core is imported before this module (compiled_fusions.py,
for the benchmark) it stays as it is.
"""

from raptr_ds.parallel.uncompiled import without_compiler

with without_compiler():
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
