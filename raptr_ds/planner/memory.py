"""Memory: what one rank holds, by formula: weights, gradients, optimizer state, and the activations of a path.

Activations are the tensors that torch keeps for the backward pass, as the model is written (raptr_ds/model): on a CPU,
or on a GPU, where attention is one kernel and layers are compiled. Not counted on a CPU: the allocator's slack,
kernels' workspaces, the framework, and fp32 copies of short sequences' attention in 16 bits (model/attention.py).
"""

from dataclasses import dataclass, replace

from raptr_ds.paths.cost import layer_parameters, outer_parameters
from raptr_ds.planner.step_time import Setting

GIB = 1 << 30
GPU_CONTEXT_BYTES = 0.6 * GIB
"""An estimate: CUDA's context, workspaces of matrix products, and what the allocator cannot hand out again."""

_FP32_BYTES = 4


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank of a pipeline stage, along paths with a given number of active layers there.

    activations: on a GPU, or what the optimizer's step needs after they are freed, if that is more. context: what the
    device needs besides tensors. never_together: bytes of gradients and activations that are not held at the same time.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    context: float = 0.0
    never_together: float = 0.0

    @property
    def total(self) -> float:
        """Bytes at the peak."""
        parts = self.weights + self.gradients + self.optimizer + self.activations + self.context
        return parts - self.never_together


def layer_activation_bytes(setting: Setting) -> float:
    """Return the bytes that one layer keeps of one micro batch for its backward pass, without recomputation.

    In units of the residual stream: 4 tensors of the whole stream (both norms' inputs and outputs), query, key, value
    and the attention's output, 2 inner ones of the MLP (4 for swiglu); then what rotary positions, RMS norms as torch
    composes them, dropout masks, and attention spelled out with dropout keep.
    """
    if setting.device.is_gpu:
        return _layer_bytes_on_gpu(setting)
    shape, layout, value = setting.shape, setting.layout, setting.layout.bytes_per_value
    positions, stream, split, inner = _sizes(setting)
    total = 4 * stream * value + 4 * split * value
    total += (4 if shape.activation == "swiglu" else 2) * inner * value
    if shape.normalization == "rmsnorm":
        total += 2 * stream * (4 if value == 4 else 4 + value)
    if shape.hidden_dropout:
        total += 2 * stream
    if shape.attention_dropout:
        scores = positions * shape.seq_length * shape.num_attention_heads / layout.tensor * _share(setting)
        total += scores * (5 + value)  # softmax in fp32, mask, weights
    elif shape.position_embedding == "rotary":
        total += 3 * split * value  # rotated query and key beside the ones that value is a view of; the output's copy
    return total + _chosen_weights(setting)


def _sizes(setting: Setting) -> tuple[int, float, float, float]:
    """Return a micro batch's positions, and a rank's values of its residual stream, its heads and its MLP.

    Of the last two as much as runs.
    """
    shape, layout, share = setting.shape, setting.layout, _share(setting)
    positions = layout.micro_batch * shape.seq_length
    width = positions * shape.hidden_size
    inner = positions * shape.ffn_hidden_size / layout.tensor * share
    return positions, width / layout.stream_ranks, width / layout.tensor * share, inner


def _share(setting: Setting) -> float:
    return 1.0 if setting.width is None else setting.width


def _chosen_weights(setting: Setting) -> float:
    """Return the bytes of the weights that a layer in parts copies from its own for a micro batch, and keeps."""
    if setting.width is None:
        return 0.0
    return setting.width * layer_parameters(setting.shape) / setting.layout.tensor * setting.layout.bytes_per_value


def _layer_bytes_on_gpu(setting: Setting) -> float:
    """Return what one layer keeps where attention is one kernel, which stores no scores, with dropout or without.

    Compiled or not: the layer's input, both norms' outputs as inputs of products, and attention's result (uncompiled:
    the stream that it was added to); query, key, value and the kernel's output; with rotary positions the rotated
    query and key too, as value is a view of what they came from; the logarithms of attention's sums. Of the MLP the
    activation's inputs and output, 2 inner tensors (swiglu 3). Uncompiled, swiglu keeps one between them as well, and
    dropout two masks, of which compiled code computes one again, and both between the reductions of tensor ranks.
    Torch's partitioner (_functorch/partitioners.py) saves inputs of matrix products, and recomputes other elementwise
    results. An RMS norm is one kernel on a GPU.
    """
    shape, layout = setting.shape, setting.layout
    positions, stream, split, inner = _sizes(setting)
    gated = 3 if layout.compiled else 4
    values = 4 * stream + (6 if shape.position_embedding == "rotary" else 4) * split
    values += (gated if shape.activation == "swiglu" else 2) * inner
    masks = 2 if not layout.compiled else 1 if layout.tensor == 1 else 0
    dropout = masks * stream if shape.hidden_dropout else 0  # a byte each
    logarithms = positions * shape.num_attention_heads / layout.tensor * _share(setting) * _FP32_BYTES
    return values * layout.bytes_per_value + dropout + logarithms + _chosen_weights(setting)


def _backward_bytes(setting: Setting) -> float:
    """Return what the backward pass of one layer needs beside what was kept, on a GPU.

    The gradients of the MLP's inner tensors and of the stream on both of its ways, and those of the layer's weights,
    before they are added to what has accumulated.
    """
    shape, layout = setting.shape, setting.layout
    positions, _, _, inner = _sizes(setting)
    inner *= 3 if shape.activation == "swiglu" else 2
    stream = positions * shape.hidden_size  # one of the two is gathered where tensor ranks hold parts of it
    weights = layer_parameters(shape) / layout.tensor
    return (inner + stream + stream / layout.stream_ranks + weights) * layout.bytes_per_value


def activation_bytes(setting: Setting, stage: int, num_active: float) -> float:
    """Return the bytes that a rank of a stage keeps at the peak, with num_active of its layers in the path.

    In 1F1B a stage has as many micro batches in flight as there are stages from it to the last. With recomputation a
    layer keeps only its input, and one layer at a time all its activations. On a GPU the memory that the backward pass
    of the head or of a layer needs on top is counted too.
    """
    shape, layout = setting.shape, setting.layout
    in_flight = min(layout.num_stages - stage, layout.num_micro_batches)
    stream = _sizes(setting)[1] * layout.bytes_per_value
    layer = layer_activation_bytes(setting)
    if layout.recompute:
        total = in_flight * num_active * stream + (layer if num_active else 0.0)
    else:
        total = in_flight * num_active * layer
    if layout.num_stages > 1:
        total += 2 * in_flight * stream  # the pipeline's buffers: what came in and what goes out
    logits = logits_bytes(setting) if stage == layout.num_stages - 1 else 0.0
    if not setting.device.is_gpu:
        return total + logits
    # The head's backward pass comes first: its logits' gradient takes their place and is then freed.
    head = logits and logits + shape.vocab_size * shape.hidden_size / layout.tensor * layout.bytes_per_value
    return total + max(head, _backward_bytes(setting) if num_active else 0.0)


def logits_bytes(setting: Setting) -> float:
    """Return the bytes of one micro batch's logits: one buffer serves all (raptr_ds/parallel/cross_entropy.py)."""
    layout = setting.layout
    logits = layout.micro_batch * setting.predicted_per_sequence * setting.shape.vocab_size / layout.tensor
    return logits * layout.bytes_per_value


def largest_micro_batch(setting: Setting, path_length: int) -> int:
    """Return the largest micro batch that keeps no more activations on a path than the layout's does on the full path.

    It is the layout's times a divisor of the number of micro batches, so that the global batch stays. One stage only.
    """
    layout = setting.layout
    assert layout.num_stages == 1, layout

    def needed(times: int, num_active: int) -> float:
        larger = replace(layout, micro_batch=times * layout.micro_batch)
        return activation_bytes(replace(setting, layout=larger), 0, num_active)

    most = needed(1, setting.shape.num_layers)
    divisors = (times for times in range(1, layout.num_micro_batches + 1) if layout.num_micro_batches % times == 0)
    return layout.micro_batch * max(times for times in divisors if times == 1 or needed(times, path_length) <= most)


def rank_memory(setting: Setting, stage: int, num_active: int, num_trained: int | None = None) -> RankMemory:
    """Return what a rank of a pipeline stage holds while training paths with num_active of the stage's layers.

    num_trained: layers of the stage that have gradients, more than num_active where a step has several paths.
    Over the data-parallel ranks, ZeRO stage 0 splits nothing, 1 the optimizer state and the fp32 weights, 2 also the
    gradients, 3 also the weights, of which up to layout.kept_whole are whole at the same time. fp32 training at ZeRO 0
    needs no second copy of the weights. Gradients are those of the trained layers, whole; ZeRO 1 and 2 hold the rank's
    share of them a second time, to accumulate or to step on. The tensor ranks' shares count as equal; norms and some
    biases are replicated, a fraction of a percent.
    """
    shape, layout = setting.shape, setting.layout
    layer, outer = layer_parameters(shape), outer_parameters(shape, stage, layout.num_stages)
    num_trained = num_active if num_trained is None else num_trained
    counts = (layout.stage_layers[stage], num_active, num_trained)
    parameters, active, trained = ((count * layer + outer) / layout.tensor for count in counts)
    value, gradient = layout.bytes_per_value, layout.gradient_bytes
    zero, shards = layout.zero_stage, layout.data
    shared = parameters / shards if zero >= 1 else parameters
    has_master = zero >= 1 or value < _FP32_BYTES
    optimizer = shared * (layout.optimizer_bytes + (_FP32_BYTES if has_master else 0))
    # No larger than all gradients (engine/deepspeed_engine.py); ZeRO 1 fills it from what has accumulated.
    reduced = gradient if zero == 1 else value
    elements = min(layout.reduce_bucket, parameters)
    bucket = layout.reduce_buffers * elements * reduced if zero >= 1 else 0
    if layout.summed_bytes != value:  # summed in another type: a copy of the bucket, at ZeRO 3 of its gradients, too
        bucket += {2: 1, 3: 2}.get(zero, 0) * elements * layout.summed_bytes
    gradients = {
        0: trained * gradient,
        1: trained * gradient + trained / shards * gradient + bucket,
        2: trained / shards * gradient + bucket,
        3: parameters / shards * gradient + bucket,
    }[zero]
    weights = parameters * value / (shards if zero == 3 else 1)
    if zero == 3:  # what is kept whole, and the layer in use
        weights += min(active, layout.kept_whole + layer / layout.tensor) * value
    activations = activation_bytes(setting, stage, num_active)
    if not setting.device.is_gpu:
        return RankMemory(weights, gradients, optimizer, activations)
    # ZeRO 0 steps on fp32 copies of gradients that are not fp32 (engine/replicated.py).
    stepped_on = trained * _FP32_BYTES if zero == 0 and gradient < _FP32_BYTES else 0.0
    # With one micro batch a step, gradients come as activations go.
    exchanged = min(gradients, activations) if layout.num_micro_batches == 1 and zero == 0 else 0.0
    return RankMemory(
        weights, gradients, optimizer, max(activations, stepped_on), context=GPU_CONTEXT_BYTES, never_together=exchanged
    )
