"""A small network for experiments on the theory of paths, with or without residual connections and layer norm."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from raptr_ds.paths.path import LayerPath
from raptr_ds.rng import stream_key


@dataclass(frozen=True)
class NetworkShape:
    """The network's sizes and parts.

    branch: a layer is one matrix, or two with a ReLU between them and twice the width inside. residual: whether a layer
    adds its branch to its input or replaces it. norm: whether a branch's input is normalized; the head's input always
    is, so that all variants have outputs of the same scale.
    """

    num_layers: int
    width: int
    num_inputs: int
    num_outputs: int
    branch: Literal["linear", "mlp"] = "mlp"
    residual: bool = True
    norm: bool = True


class ResidualNetwork(nn.Module):
    """Embedding, layers that a path may skip, normalization, head. Weights are a pure function of shape and seed."""

    def __init__(self, shape: NetworkShape, seed: int) -> None:
        super().__init__()
        self.shape = shape
        generator = torch.Generator().manual_seed(stream_key(seed, "residual network"))

        def matrix(num_outputs: int, num_inputs: int, gain: float = 1.0) -> nn.Parameter:
            deviation = gain / math.sqrt(num_inputs)
            return nn.Parameter(torch.randn(num_outputs, num_inputs, generator=generator) * deviation)

        width, inner = shape.width, 2 * shape.width
        self.embedding = matrix(width, shape.num_inputs)
        self.first = nn.ParameterList()
        self.second = nn.ParameterList()
        for _ in range(shape.num_layers):
            if shape.branch == "linear":
                self.first.append(matrix(width, width))
            else:
                self.first.append(matrix(inner, width, math.sqrt(2.0)))  # a ReLU halves the second moment
                self.second.append(matrix(width, inner))
        self.biases = nn.ParameterList([nn.Parameter(torch.zeros(inner)) for _ in self.second])
        self.head = matrix(shape.num_outputs, width)

    def forward(self, x: torch.Tensor, path: LayerPath) -> torch.Tensor:
        """Return the outputs (N, num_outputs) for inputs (N, num_inputs); layers outside the path are the identity."""
        h = F.linear(x, self.embedding)
        for layer in path.layers:
            branch = F.linear(self._normalized(h) if self.shape.norm else h, self.first[layer])
            if self.shape.branch == "mlp":
                branch = F.linear(F.relu(branch + self.biases[layer]), self.second[layer])
            branch = branch * path.scale_of(layer)
            h = h + branch if self.shape.residual else branch
        return F.linear(self._normalized(h), self.head)

    def _normalized(self, h: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(h, (self.shape.width,))
