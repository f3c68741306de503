"""Cost: parameters of a model, and the floating-point operations that a path executes, as exact formulas.

Counted are matrix products, 2 m n k for (m, k) by (k, n): projections, attention scores and values over the whole
T x T matrix (a mask removes no work), MLP, head. Not counted: norms, activations, softmax, embedding look-up, the
optimizer; together a few percent at most.
"""

from dataclasses import dataclass

from raptr_ds.config.sections import ModelSection
from raptr_ds.paths.path import LayerPath
from raptr_ds.paths.protocol import PathMethod
from raptr_ds.paths.schedule import Phase

_PASSES = 3  # one forward; the backward forms two products for each forward one: by input and by weight


def layer_forward_flops(shape: ModelSection) -> int:
    """Return the FLOPs of one layer's forward pass over one sequence of seq_length tokens.

    8 T h^2 for query, key, value and output projections, 4 T^2 h for scores and weighted values, 4 T h f for a gelu
    MLP or 6 T h f for a gated one (swiglu has three matrices).
    """
    tokens, hidden = shape.seq_length, shape.hidden_size
    attention = 8 * tokens * hidden**2 + 4 * tokens**2 * hidden
    mlp_matrices = 3 if shape.activation == "swiglu" else 2
    return attention + 2 * mlp_matrices * tokens * hidden * shape.ffn_hidden_size


def head_cost_in_layers(shape: ModelSection, predicted_per_sequence: float) -> float:
    """Return the head's cost in units of one layer's; predicted_per_sequence may be an expectation.

    Forward and backward are in the same proportion. The embedding is a look-up, which costs nothing in these units.
    """
    return predicted_per_sequence * head_forward_flops(shape, 1) / layer_forward_flops(shape)


def head_forward_flops(shape: ModelSection, num_predicted: int) -> int:
    """Return the FLOPs of the head's forward pass over num_predicted positions, the only ones it runs on."""
    transform = 2 * shape.hidden_size**2 if _has_head_transform(shape) else 0
    return num_predicted * (transform + 2 * shape.hidden_size * shape.vocab_size)


def step_flops(
    shape: ModelSection,
    path_length: float,
    num_sequences: int,
    num_predicted: int,
    activation_checkpointing: bool = False,
) -> int:
    """Return the FLOPs executed in one training step, forward and backward, by the whole job.

    num_sequences: sequences of the global batch; num_predicted: predicted positions in all of them.
    Layers count three forward passes, four with activation checkpointing, which runs them forward once more (torch's
    non-reentrant form leaves out a layer's last product, as nothing needs it). The head counts three. A skipped layer
    counts nothing. path_length: in whole layers, LayerPath.work where they run in parts.
    """
    layer_passes = _PASSES + (1 if activation_checkpointing else 0)
    layers = layer_passes * path_length * num_sequences * layer_forward_flops(shape)
    return round(layers) + _PASSES * head_forward_flops(shape, num_predicted)


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of a run's training steps, forward and backward, by the whole job.

    num_sequences: of the global batch. recompute: layers run forward once more in the backward pass, but for those of
    a pipeline stage with at most keep_up_to active layers. stages: the layers of each stage; empty: all in one.
    num_predicted, everywhere: predicted positions of the global batch.
    """

    shape: ModelSection
    num_sequences: int
    recompute: bool = False
    keep_up_to: int = 0
    stages: tuple[range, ...] = ()

    @property
    def tokens(self) -> int:
        """Positions of a global batch."""
        return self.num_sequences * self.shape.seq_length

    def flops(self, path: LayerPath, num_predicted: int) -> int:
        """Return the FLOPs of a step along `path`."""
        recomputed = sum(map(self._recomputed_work, path.draws)) / len(path.draws)
        recomputed *= self.num_sequences * layer_forward_flops(self.shape)
        return round(recomputed) + step_flops(self.shape, path.work, self.num_sequences, num_predicted)

    def _recomputed_work(self, path: LayerPath) -> float:
        if not self.recompute:
            return 0.0
        stages = self.stages or (range(path.num_layers),)
        counts = [len(path.active_in(layers)) for layers in stages]
        share = path.work / max(1, path.length)
        return share * sum(count for count in counts if count > self.keep_up_to)

    def expected_flops(self, path_length: float, num_predicted: int, num_active: float | None = None) -> float:
        """Return the FLOPs of a step whose path has this length in expectation, spread evenly over the stages.

        path_length: in whole layers; num_active: layers on the path, where they run in parts.
        """
        num_active = path_length if num_active is None else num_active
        recomputes = self.recompute and num_active / max(1, len(self.stages)) > self.keep_up_to
        head = step_flops(self.shape, 0, self.num_sequences, num_predicted)
        layer = step_flops(self.shape, 1, self.num_sequences, 0, activation_checkpointing=recomputes)
        return head + path_length * layer

    def flops_left(self, method: PathMethod, step: int, num_predicted: int) -> float:
        """Return the FLOPs expected from a 0-based step on, from the method's expected path lengths."""
        return sum(self.phase_flops(method, phase, step, num_predicted) for phase in method.phases)

    def phase_flops(self, method: PathMethod, phase: Phase, step: int, num_predicted: int) -> float:
        """Return the FLOPs expected of a phase's steps from a 0-based step on."""
        num_steps = phase.steps_from(step)
        if not num_steps:
            return 0.0
        first = max(step, phase.first_step)
        layers = method.expected_layers_from(first) - method.expected_layers_from(phase.end_step)
        return num_steps * self.expected_flops(layers / num_steps, num_predicted, phase.path_length)


def layer_parameters(shape: ModelSection) -> int:
    """Return the number of parameters of one layer: four projections, the MLP, two norms, biases."""
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    mlp_inputs = 2 if shape.activation == "swiglu" else 1
    layer = 4 * hidden**2 + (mlp_inputs + 1) * hidden * ffn + 2 * _norm_parameters(shape)
    return layer + (4 * hidden + mlp_inputs * ffn + hidden if shape.add_bias_linear else 0)


def _has_head_transform(shape: ModelSection) -> bool:
    """Whether dense, activation and norm come before the vocabulary projection, and a bias after it."""
    return shape.architecture == "bert"


def _norm_parameters(shape: ModelSection) -> int:
    return 2 * shape.hidden_size if shape.normalization == "layernorm" else shape.hidden_size


def num_parameters(shape: ModelSection) -> int:
    """Return the number of parameters of the unsplit model, tied weights counted once.

    BERT as Megatron's pre-layer-norm encoder without token types: a final norm after the last layer, and a head of
    dense, gelu, layer norm, tied projection and output bias. UL2: rotary positions hold no parameters, no biases.
    """
    hidden, norm = shape.hidden_size, _norm_parameters(shape)
    positions = shape.seq_length * hidden if shape.position_embedding == "learned" else 0
    total = shape.vocab_size * hidden + positions + shape.num_layers * layer_parameters(shape) + norm
    if not shape.tie_word_embeddings:
        total += shape.vocab_size * hidden
    if _has_head_transform(shape):
        total += hidden**2 + hidden + norm + shape.vocab_size
    return total


def outer_parameters(shape: ModelSection, stage: int = 0, num_stages: int = 1) -> int:
    """Return the parameters beside the layers that a pipeline stage holds: embedding on the first, head on the last.

    Where the embedding is tied, the last of several stages has a copy of it.
    """
    outer = num_parameters(shape) - shape.num_layers * layer_parameters(shape)
    if num_stages == 1:
        return outer
    words = shape.vocab_size * shape.hidden_size
    first = words + (shape.seq_length * shape.hidden_size if shape.position_embedding == "learned" else 0)
    last = outer - first + (words if shape.tie_word_embeddings else 0)
    return {0: first, num_stages - 1: last}.get(stage, 0)
