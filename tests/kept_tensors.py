"""What a layer keeps for its backward pass on a GPU, counted on a CPU: stand-ins for what a GPU has a kernel for.

Attention is an operator of its own that keeps query, key, value, its output and the logarithms of its sums, as the
fused kernels do, with dropout or without; an RMS norm keeps its input and one number for each row. Compiling stops
where torch has decided what to keep and what to compute again (its partitioner), before code is generated.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from raptr_ds.config.derive import derive_model
from raptr_ds.config.sections import ModelSection
from raptr_ds.data.batch import MicroBatch, collate
from raptr_ds.data.sample import Sample
from raptr_ds.model.stage import Stage, build_stage
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.paths import Path
from raptr_ds.paths.cost import ModelShape
from tests.dropout_masks import streams_of

LENGTH, VOCAB, BATCH, LAYERS, PREDICTED = 160, 3000, 2, 5, 9
PARTITIONED = "aot_eager_decomp_partition"  # torch.compile's backend that does all but generate code


@torch.library.custom_op("tests::attention", mutates_args=())
def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an output (b, T, heads, head dim) and a number for each row (b, heads, T); only their shapes count."""
    return torch.zeros_like(query.transpose(1, 2)).contiguous(), query.new_zeros(query.shape[:3], dtype=torch.float32)


@_attention.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, length, size = query.shape
    return query.new_empty(batch, length, heads, size), query.new_empty(batch, heads, length, dtype=torch.float32)


@torch.library.custom_op("tests::attention_backward", mutates_args=())
def _backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    logarithms: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return zeros in place of the three gradients."""
    return torch.zeros_like(query), torch.zeros_like(key), torch.zeros(value.shape, dtype=value.dtype)


@_backward.register_fake
def _(gradient: Any, query: Any, key: Any, value: Any, output: Any, logarithms: Any) -> Any:
    return torch.empty_like(query), torch.empty_like(key), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _differentiate(ctx: Any, gradient: torch.Tensor, _: torch.Tensor) -> Any:
    return _backward(gradient, *ctx.saved_tensors)


_attention.register_autograd(_differentiate, setup_context=_keep)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> torch.Tensor:
    return _attention(query, key, value)[0].transpose(1, 2)


class _RMSNorm(torch.autograd.Function):
    """Keeps what CUDA's kernel keeps (aten::_fused_rms_norm): the input and a number for each row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:  # pyright: ignore
        scale = (x.float().square().mean(-1, keepdim=True) + epsilon).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:  # pyright: ignore
        raise NotImplementedError("only what is kept counts")


@contextlib.contextmanager
def stand_ins(is_compiled: bool) -> Iterator[None]:
    """Replace what a GPU has kernels for; an RMS norm in compiled code is composed there as well."""
    attend, norm = functional.scaled_dot_product_attention, functional.rms_norm
    functional.scaled_dot_product_attention = _attend  # type: ignore[assignment]
    if not is_compiled:
        functional.rms_norm = lambda x, _shape, weight, epsilon: _RMSNorm.apply(x, weight, epsilon)  # type: ignore
    try:
        yield
    finally:
        functional.scaled_dot_product_attention, functional.rms_norm = attend, norm
        torch._dynamo.reset()


def model_of(architecture: str, dropouts: tuple[float, float] = (0.0, 0.0)) -> ModelSection:
    """Return a small model."""
    return derive_model(
        ModelSection(
            architecture=architecture,  # type: ignore[arg-type]
            num_layers=LAYERS,
            hidden_size=128,
            num_attention_heads=4,
            seq_length=LENGTH,
            vocab_size=VOCAB,
            hidden_dropout=dropouts[0],
            attention_dropout=dropouts[1],
        )
    )


def shape_of(architecture: str) -> ModelShape:
    """Return the small model's shape."""
    model = model_of(architecture)
    return ModelShape(**{name: getattr(model, name) for name in ModelShape.__dataclass_fields__})


def build(
    groups: ProcessGroups, model: ModelSection, dtype: torch.dtype, recompute: bool = False
) -> tuple[Stage, MicroBatch]:
    """Return the model and a micro batch for it."""
    stage = build_stage(model, groups, range(LAYERS), recompute, 1).to(dtype)
    positions = np.arange(PREDICTED)
    sample = Sample(np.zeros(LENGTH, np.int64), positions, np.zeros(PREDICTED, np.int64), LENGTH // 2)
    return stage, collate([sample] * BATCH, range(BATCH), LENGTH, 0)


def kept_bytes(stage: Stage, micro: MicroBatch, path_length: int) -> int:
    """Return the bytes of all storages that autograd saves on a path, parameters aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in stage.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor  # alive, so that no other storage gets its address
        return tensor

    path, streams = Path(tuple(range(path_length)), LAYERS), streams_of(1, 0, micro.sample_ids)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = stage(micro.tokens, micro, path, streams)
    node: Any = losses.grad_fn
    assert len(node.exponentials) == PREDICTED * BATCH  # the cross-entropy's own, which no hook sees
    return node.exponentials.untyped_storage().nbytes() + sum(t.untyped_storage().nbytes() for t in kept.values())


def kept_by_a_layer(groups: ProcessGroups, architecture: str, rate: float, is_compiled: bool) -> float:
    """Return the bytes that one layer of the model keeps in bf16 on a GPU, with hidden dropout at `rate`."""
    stage, micro = build(groups, model_of(architecture, (rate, 0.0)), torch.bfloat16)
    with stand_ins(is_compiled):
        if is_compiled:
            for block in stage.layers.values():
                block.compile(dynamic=False, backend=PARTITIONED)
        return (kept_bytes(stage, micro, 4) - kept_bytes(stage, micro, 1)) / 3
