"""What we use of megatron-core, imported without the rest of it: a second of CPU in every process.

megatron-core 0.16.1 imports its distributed optimizer, FSDP, inference and Transformer Engine layers from the
`__init__` of the packages that hold the modules below, and with them torch's DTensor, sympy and setuptools.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

from raptr_ds.parallel.uncompiled import without_compiler


class _PostponedPackage(ModuleType):
    """A package whose modules can be imported before its `__init__`, which runs when a name is used that it defines."""

    def __getattr__(self, name: str) -> Any:
        module = f"{self.__name__}.{name}"
        if not name.startswith("__") and find_spec(module) is not None:
            return import_module(module)
        self.__class__ = ModuleType  # pyright: ignore[reportAttributeAccessIssue]
        assert self.__spec__ is not None
        assert self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def _postpone(*packages: str) -> None:
    """Postpone the `__init__` of packages, parents first; those that are imported already stay as they are."""
    for name in packages:
        spec = find_spec(name)
        if spec is not None and name not in sys.modules:
            package = module_from_spec(spec)
            package.__class__ = _PostponedPackage
            sys.modules[name] = package
            parent, _, child = name.rpartition(".")
            setattr(sys.modules[parent], child, package)


@contextmanager
def _hidden(*modules: str) -> Iterator[None]:
    """Make imports of modules fail in this block, for a library that works without them; imported ones stay."""
    hidden = [name for name in modules if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


_postpone(
    "megatron.core", "megatron.core.dist_checkpointing", "megatron.core.tensor_parallel", "megatron.core.transformer"
)
with _hidden("torch.distributed._tensor", "triton"), without_compiler():
    from megatron.core import parallel_state
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
    from megatron.core.tensor_parallel.mappings import (
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
