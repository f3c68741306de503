"""Memory: what one rank holds, by formula: weights, gradients, optimizer state, and the activations of a path.

Activations are the tensors that torch keeps for the backward pass, as the model is written (raptr_ds/model): on a CPU,
or on a GPU, where attention is one kernel and layers are compiled. Not counted on a CPU: the allocator's slack,
kernels' workspaces, the framework, and fp32 copies of short sequences' attention in 16 bits (model/attention.py).
"""

from dataclasses import dataclass, replace

from raptr_ds.config.sections import ModelSection
from raptr_ds.paths.cost import layer_parameters, outer_parameters
from raptr_ds.planner.step_time import Layout

GPU_CONTEXT_BYTES = 0.6 * 2**30
"""An estimate: CUDA's context, workspaces of matrix products, and what the allocator cannot hand out again."""

_FP32_BYTES = 4


@dataclass(frozen=True)
class TrainingState:
    """What decides memory besides the model's shape and the layout.

    optimizer_bytes: the optimizer's fp32 state for each parameter (Adam 8). reduce_bucket: elements of a buffer of
    gradients in ZeRO, at most; reduce_buffers: their number. on_gpu: attention is one kernel, with dropout or without.
    compiled: layers are compiled by torch.compile, which makes no difference here on a CPU.
    """

    num_attention_heads: int
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    optimizer_bytes: int = 8
    reduce_bucket: int = 0
    reduce_buffers: int = 1
    on_gpu: bool = False
    compiled: bool = False


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


def stage_parameters(shape: ModelSection, layout: Layout, stage: int, num_active: int | None = None) -> float:
    """Return the parameters of one rank of a stage: its layers (or only num_active of them), embedding, head.

    The tensor ranks' shares are counted as equal; norms and some biases are replicated, a fraction of a percent.
    """
    num_layers = layout.stage_layers[stage] if num_active is None else num_active
    outer = outer_parameters(shape, stage, layout.num_stages)
    return (num_layers * layer_parameters(shape) + outer) / layout.tensor


def layer_activation_bytes(shape: ModelSection, layout: Layout, state: TrainingState) -> float:
    """Return the bytes that one layer keeps of one micro batch for its backward pass, without recomputation.

    In units of the residual stream: 4 tensors of the whole stream (both norms' inputs and outputs), query, key, value
    and the attention's output, 2 inner ones of the MLP (4 for swiglu); then what rotary positions, RMS norms as torch
    composes them, dropout masks, and attention spelled out with dropout keep.
    """
    if state.on_gpu:
        return _layer_bytes_on_gpu(shape, layout, state)
    value = layout.bytes_per_value
    positions = layout.micro_batch * shape.seq_length
    stream = positions * shape.hidden_size / layout.stream_ranks
    inner = positions * shape.ffn_hidden_size / layout.tensor
    split = positions * shape.hidden_size / layout.tensor
    total = 4 * stream * value + 4 * split * value
    total += (4 if shape.activation == "swiglu" else 2) * inner * value
    if shape.normalization == "rmsnorm":
        total += 2 * stream * (4 if value == 4 else 4 + value)
    if state.hidden_dropout:
        total += 2 * stream
    if state.attention_dropout:
        scores = positions * shape.seq_length * state.num_attention_heads / layout.tensor
        total += scores * (5 + value)  # softmax in fp32, mask, weights
    elif shape.position_embedding == "rotary":
        total += 3 * split * value  # rotated query and key beside the ones that value is a view of; the output's copy
    return total


def _layer_bytes_on_gpu(shape: ModelSection, layout: Layout, state: TrainingState) -> float:
    """Return what one layer keeps where attention is one kernel, which stores no scores, with dropout or without.

    Compiled or not: the layer's input, both norms' outputs as inputs of products, and attention's result (uncompiled:
    the stream that it was added to); query, key, value and the kernel's output; with rotary positions the rotated
    query and key too, as value is a view of what they came from; the logarithms of attention's sums. Of the MLP the
    activation's inputs and output, 2 inner tensors (swiglu 3). Uncompiled, swiglu keeps one between them as well, and
    dropout two masks, of which compiled code computes one again, and both between the reductions of tensor ranks.
    Torch's partitioner (_functorch/partitioners.py) saves inputs of matrix products, and recomputes other elementwise
    results. An RMS norm is one kernel on a GPU.
    """
    positions = layout.micro_batch * shape.seq_length
    stream = positions * shape.hidden_size / layout.stream_ranks
    split = positions * shape.hidden_size / layout.tensor
    inner = positions * shape.ffn_hidden_size / layout.tensor
    gated = 3 if state.compiled else 4
    values = 4 * stream + (6 if shape.position_embedding == "rotary" else 4) * split
    values += (gated if shape.activation == "swiglu" else 2) * inner
    masks = 2 if not state.compiled else 1 if layout.tensor == 1 else 0
    dropout = masks * stream if state.hidden_dropout else 0  # a byte each
    logarithms = positions * state.num_attention_heads / layout.tensor * _FP32_BYTES
    return values * layout.bytes_per_value + dropout + logarithms


def _backward_bytes(shape: ModelSection, layout: Layout) -> float:
    """Return what the backward pass of one layer needs beside what was kept, on a GPU.

    The gradients of the MLP's inner tensors and of the stream on both of its ways, and those of the layer's weights,
    before they are added to what has accumulated.
    """
    positions = layout.micro_batch * shape.seq_length
    inner = (3 if shape.activation == "swiglu" else 2) * positions * shape.ffn_hidden_size / layout.tensor
    stream = positions * shape.hidden_size  # one of the two is gathered where tensor ranks hold parts of it
    weights = layer_parameters(shape) / layout.tensor
    return (inner + stream + stream / layout.stream_ranks + weights) * layout.bytes_per_value


def activation_bytes(
    shape: ModelSection,
    layout: Layout,
    state: TrainingState,
    stage: int,
    num_active: float,
    predicted_per_sequence: float,
) -> float:
    """Return the bytes that a rank of a stage keeps at the peak, with num_active of its layers in the path.

    In 1F1B a stage has as many micro batches in flight as there are stages from it to the last. With recomputation a
    layer keeps only its input, and one layer at a time all its activations. On a GPU the memory that the backward pass
    of the head or of a layer needs on top is counted too.
    """
    in_flight = min(layout.num_stages - stage, layout.num_micro_batches)
    stream = layout.micro_batch * shape.seq_length * shape.hidden_size / layout.stream_ranks * layout.bytes_per_value
    layer = layer_activation_bytes(shape, layout, state)
    if layout.recompute:
        total = in_flight * num_active * stream + (layer if num_active else 0.0)
    else:
        total = in_flight * num_active * layer
    if layout.num_stages > 1:
        total += 2 * in_flight * stream  # the pipeline's buffers: what came in and what goes out
    logits = logits_bytes(shape, layout, predicted_per_sequence) if stage == layout.num_stages - 1 else 0.0
    if not state.on_gpu:
        return total + logits
    # The head's backward pass comes first: its logits' gradient takes their place and is then freed.
    head = logits and logits + shape.vocab_size * shape.hidden_size / layout.tensor * layout.bytes_per_value
    return total + max(head, _backward_bytes(shape, layout) if num_active else 0.0)


def logits_bytes(shape: ModelSection, layout: Layout, predicted_per_sequence: float) -> float:
    """Return the bytes of one micro batch's logits: one buffer serves all (raptr_ds/parallel/cross_entropy.py)."""
    logits = layout.micro_batch * predicted_per_sequence * shape.vocab_size / layout.tensor
    return logits * layout.bytes_per_value


def largest_micro_batch(
    shape: ModelSection, layout: Layout, state: TrainingState, path_length: int, predicted_per_sequence: float
) -> int:
    """Return the largest micro batch that keeps no more activations on a path than the layout's does on the full path.

    It is the layout's times a divisor of the number of micro batches, so that the global batch stays. One stage only.
    """
    assert layout.num_stages == 1, layout

    def needed(times: int, num_active: int) -> float:
        larger = replace(layout, micro_batch=times * layout.micro_batch)
        return activation_bytes(shape, larger, state, 0, num_active, predicted_per_sequence)

    most = needed(1, shape.num_layers)
    divisors = (times for times in range(1, layout.num_micro_batches + 1) if layout.num_micro_batches % times == 0)
    return layout.micro_batch * max(times for times in divisors if times == 1 or needed(times, path_length) <= most)


def rank_memory(
    shape: ModelSection,
    layout: Layout,
    state: TrainingState,
    stage: int,
    num_active: int,
    predicted_per_sequence: float,
) -> RankMemory:
    """Return what a rank of a pipeline stage holds while training paths with num_active of the stage's layers.

    Over the data-parallel ranks, ZeRO stage 0 splits nothing, 1 the optimizer state and the fp32 weights, 2 also the
    gradients, 3 also the weights, of which up to layout.kept_whole are whole at the same time. fp32 training at ZeRO 0
    needs no second copy of the weights. Gradients are those of the active layers; ZeRO 1 and 2 hold the rank's share of
    them a second time, to accumulate or to step on.
    """
    parameters = stage_parameters(shape, layout, stage)
    active = stage_parameters(shape, layout, stage, num_active)
    value, gradient = layout.bytes_per_value, layout.gradient_bytes_per_value or layout.bytes_per_value
    zero, shards = layout.zero_stage, layout.data
    shared = parameters / shards if zero >= 1 else parameters
    has_master = zero >= 1 or value < _FP32_BYTES
    optimizer = shared * (state.optimizer_bytes + (_FP32_BYTES if has_master else 0))
    # No larger than all gradients (engine/deepspeed_engine.py); ZeRO 1 fills it from what has accumulated.
    reduced = gradient if zero == 1 else value
    bucket = state.reduce_buffers * min(state.reduce_bucket, parameters) * reduced if zero >= 1 else 0
    gradients = {
        0: active * gradient,
        1: active * gradient + active / shards * gradient + bucket,
        2: active / shards * gradient + bucket,
        3: parameters / shards * gradient + bucket,
    }[zero]
    weights = parameters * value / (shards if zero == 3 else 1)
    if zero == 3:  # what is kept whole, and the layer in use
        weights += min(active, layout.kept_whole + layer_parameters(shape) / layout.tensor) * value
    activations = activation_bytes(shape, layout, state, stage, num_active, predicted_per_sequence)
    if not state.on_gpu:
        return RankMemory(weights, gradients, optimizer, activations)
    # ZeRO 0 steps on fp32 copies of gradients that are not fp32 (engine/replicated.py).
    stepped_on = active * _FP32_BYTES if zero == 0 and gradient < _FP32_BYTES else 0.0
    # With one micro batch a step, gradients come as activations go.
    exchanged = min(gradients, activations) if layout.num_micro_batches == 1 and zero == 0 else 0.0
    return RankMemory(
        weights, gradients, optimizer, max(activations, stepped_on), context=GPU_CONTEXT_BYTES, never_together=exchanged
    )
