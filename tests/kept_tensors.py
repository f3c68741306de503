"""What a layer keeps for its backward pass on a GPU, counted on a CPU: stand-ins for what a GPU has a kernel for.

Attention is our kernel, interpreted. An RMS norm keeps its input and one number for each row. Compiling stops where
torch has decided what to keep and what to compute again (its partitioner), before code is generated.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional

import tests.interpreted  # noqa: F401 - before the kernels
from raptr_ds.config.sections import ModelSection
from raptr_ds.data.batch import MicroBatch, Sample, collate
from raptr_ds.model.stage import Stage, build_stage
from raptr_ds.parallel.groups import ProcessGroups
from raptr_ds.paths import LayerPath
from raptr_ds.paths.path import Parts
from tests.dropout_masks import streams_of

LENGTH, VOCAB, BATCH, LAYERS, PREDICTED = 160, 3000, 2, 5, 9
PARTITIONED = "aot_eager_decomp_partition"  # torch.compile's backend that does all but generate code


class _RMSNorm(torch.autograd.Function):
    """Keeps what CUDA's kernel keeps (aten::_fused_rms_norm): the input and a number for each row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:  # pyright: ignore
        scale = (x.float().square().mean(-1, keepdim=True) + epsilon).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:  # pyright: ignore
        raise AssertionError("only what is kept counts")


@contextlib.contextmanager
def stand_ins(is_compiled: bool) -> Iterator[None]:
    """Replace what a GPU has a kernel for; an RMS norm in compiled code is composed there as well."""
    norm = functional.rms_norm
    if not is_compiled:
        functional.rms_norm = lambda x, _shape, weight, epsilon: _RMSNorm.apply(x, weight, epsilon)  # type: ignore
    try:
        yield
    finally:
        functional.rms_norm = norm
        torch._dynamo.reset()


def model_of(architecture: str, dropouts: tuple[float, float] = (0.0, 0.0)) -> ModelSection:
    """Return a small model."""
    return ModelSection(
        architecture=architecture,  # type: ignore[arg-type]
        num_layers=LAYERS,
        hidden_size=128,
        num_attention_heads=4,
        seq_length=LENGTH,
        vocab_size=VOCAB,
        hidden_dropout=dropouts[0],
        attention_dropout=dropouts[1],
    )


def build(
    groups: ProcessGroups, model: ModelSection, dtype: torch.dtype, recompute: bool = False, on_gpu: bool = False
) -> tuple[Stage, MicroBatch]:
    """Return the model, as it is built for a CPU or a GPU, and a micro batch for it."""
    stage = build_stage(model, groups, range(LAYERS), recompute, 1, attention_kernel=on_gpu).to(dtype)
    positions = np.arange(PREDICTED)
    sample = Sample(np.zeros(LENGTH, np.int64), positions, np.zeros(PREDICTED, np.int64), LENGTH // 2)
    return stage, collate([sample] * BATCH, range(BATCH), LENGTH, 0)


def kept_bytes(stage: Stage, micro: MicroBatch, path_length: int, width: int | None = None) -> int:
    """Return the bytes of all storages that autograd saves on a path, parameters aside. width: heads of each layer."""
    own = {parameter.untyped_storage().data_ptr() for parameter in stage.parameters()}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor  # alive, so that no other storage gets its address
        return tensor

    path, streams = LayerPath(tuple(range(path_length)), LAYERS), streams_of(1, 0, micro.sample_ids)
    if width is not None:
        chosen = tuple(tuple(range(width)) if path.is_active(layer) else () for layer in range(LAYERS))
        path = replace(path, parts=Parts(stage.model.num_attention_heads, chosen, chosen))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = stage(micro.tokens, micro, path, streams)
    node: Any = losses.grad_fn
    assert len(node.logits) == PREDICTED * BATCH  # the cross-entropy's own, which no hook sees
    return node.logits.untyped_storage().nbytes() + sum(t.untyped_storage().nbytes() for t in kept.values())


def kept_by_a_layer(groups: ProcessGroups, architecture: str, rate: float, is_compiled: bool) -> float:
    """Return the bytes that one layer of the model keeps in bf16 on a GPU, with hidden dropout at `rate`."""
    stage, micro = build(groups, model_of(architecture, (rate, rate)), torch.bfloat16, on_gpu=True)
    with stand_ins(is_compiled):
        if is_compiled:
            for block in stage.layers.values():
                block.compile(dynamic=False, backend=PARTITIONED)
        return (kept_bytes(stage, micro, 4) - kept_bytes(stage, micro, 1)) / 3
