"""Running libraries prepared for torch.compile without loading it: a second of CPU in every process, two with inductor.

Where layers are compiled, torch loads it then.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


@contextmanager
def without_compiler() -> Iterator[None]:
    """Leave functions uncompiled that modules imported in this block decorate with torch.compile.

    The decorator loads torch's inductor when a module is imported, whoever calls the function.
    """

    def leave(function: Callable[..., Any] | None = None, **_: Any) -> Any:
        return leave if function is None else function

    compiler = torch.compile
    torch.compile = leave  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiler


def outside_graphs(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Keep a function out of compiled graphs; torch.compiler.disable would load the compiler to say so."""
    disabled = torch._disable_dynamo(function)  # pyright: ignore[reportPrivateImportUsage]

    @wraps(function)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        return (disabled if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return call


def keep_optimizers_eager() -> None:
    """Take from torch's optimizers what keeps them out of compiled graphs, and loads the compiler when first called.

    We compile layers only. torch 2.13.0: torch/_compile.py, and torch/optim/optimizer.py, _use_grad_for_differentiable.
    """
    for method in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"):
        setattr(Optimizer, method, inspect.unwrap(getattr(Optimizer, method)))
    for optimizer in (Adam, AdamW, SGD):
        optimizer.step = torch.no_grad()(inspect.unwrap(optimizer.step))  # type: ignore[method-assign]
