"""BERT and its training loop in plain torch, a sequence at a time: an oracle that shares no code with the model, its
paths or its engines. Layers are a list of weights, so that skipping, inserting and repeating them is what it says."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from raptr_ds.model.stage import build_stage
from raptr_ds.parallel.groups import lone_process_groups
from tests.dist.trajectory import NUM_HEADS, SEED, Case, model_of, sample

Weights = dict[str, torch.Tensor]
Parts = tuple[int, ...]
ALL: Parts = tuple(range(NUM_HEADS))


@dataclass(frozen=True)
class Taken:
    """A layer that a sequence takes: its place in the model, the factor on its branches, its heads and blocks."""

    place: int
    scale: float = 1.0
    heads: Parts = ALL
    blocks: Parts = ALL


@dataclass
class AdamState:
    """Moments and steps of one weight."""

    mean: torch.Tensor
    square: torch.Tensor
    steps: int = 0


@dataclass
class PlainModel:
    """Weights by their names within a layer, in the order in which layers run, and those outside them."""

    outer: Weights
    layers: list[Weights]
    states: dict[torch.Tensor, "AdamState"] = field(default_factory=dict)

    @classmethod
    def of(cls, case: Case, layers: tuple[int, ...]) -> "PlainModel":
        """Return the model of these layers alone, with the weights that they begin a run with."""
        weights = initial_weights(case)
        outer = {name: weight for name, weight in weights.items() if not name.startswith("layers.")}
        return cls(outer, [layer_of(weights, layer) for layer in layers])

    def copy_of(self, layer: Weights, with_state: bool = True) -> Weights:
        """Return a copy of a layer's weights, with the states that their optimizer steps have left or without."""
        new = {name: weight.detach().clone().requires_grad_() for name, weight in layer.items()}
        for name, weight in layer.items() if with_state else ():
            state = self.states[weight]
            self.states[new[name]] = AdamState(state.mean.clone(), state.square.clone(), state.steps)
        return new

    def named(self) -> dict[str, np.ndarray]:
        """Return all weights by canonical name, layers by their place."""
        layers = {f"layers.{i}.{name}": w for i, layer in enumerate(self.layers) for name, w in layer.items()}
        return {name: weight.detach().numpy() for name, weight in (self.outer | layers).items()}

    def loss(self, case: Case, number: int, taken: list[Taken]) -> torch.Tensor:
        """Return the summed loss of a sequence along the layers that it takes."""
        data, outer = sample(case, number), self.outer
        tokens = torch.from_numpy(data.tokens)
        x = outer["embedding.word.weight"][tokens] + outer["embedding.position.weight"][: len(tokens)]
        for layer in taken:
            weights = self.layers[layer.place]
            x = x + layer.scale * attention(norm(x, weights, "attention_norm"), weights, layer.heads)
            x = x + layer.scale * mlp(norm(x, weights, "mlp_norm"), weights, layer.blocks)
        x = norm(x, outer, "head.norm")[torch.from_numpy(data.positions)]
        x = F.gelu(x @ outer["head.transform.weight"].T + outer["head.transform.bias"])
        x = norm(x, outer, "head.transform_norm")
        logits = x @ outer["embedding.word.weight"].T + outer["head.bias"]
        return F.cross_entropy(logits, torch.from_numpy(data.targets), reduction="sum")


def norm(x: torch.Tensor, weights: Weights, name: str) -> torch.Tensor:
    """Return the layer norm of the last dim."""
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)


def attention(x: torch.Tensor, weights: Weights, heads: Parts) -> torch.Tensor:
    """Return the branch's output: the sum of what each head adds."""
    hidden = x.shape[-1]
    size = hidden // NUM_HEADS
    rows = weights["attention.qkv.weight"].view(NUM_HEADS, 3, size, hidden)
    biases = weights["attention.qkv.bias"].view(NUM_HEADS, 3, size)
    total = weights["attention.output.bias"].expand_as(x)
    for head in heads:
        query, key, value = (x @ rows[head, kind].T + biases[head, kind] for kind in range(3))
        mixed = (query @ key.T / math.sqrt(size)).softmax(-1) @ value
        total = total + mixed @ weights["attention.output.weight"][:, head * size : (head + 1) * size].T
    return total


def mlp(x: torch.Tensor, weights: Weights, blocks: Parts) -> torch.Tensor:
    """Return the branch's output: the sum of what each block of inner features adds."""
    size = len(weights["mlp.expand.bias"]) // NUM_HEADS
    total = weights["mlp.contract.bias"].expand_as(x)
    for block in blocks:
        part = slice(block * size, (block + 1) * size)
        inner = F.gelu(x @ weights["mlp.expand.weight"][part].T + weights["mlp.expand.bias"][part])
        total = total + inner @ weights["mlp.contract.weight"][:, part].T
    return total


def initial_weights(case: Case) -> Weights:
    """Return the weights that a run begins with, by canonical name."""
    with lone_process_groups() as groups:
        stage = build_stage(model_of(case), groups, range(case.num_layers), recompute=False, seed=SEED)
    return {name: weight.detach().clone().requires_grad_() for name, weight in stage.named_parameters()}


def layer_of(weights: Weights, layer: int) -> Weights:
    """Return the weights of a layer by their names within it."""
    start = f"layers.{layer}."
    return {name.removeprefix(start): weight for name, weight in weights.items() if name.startswith(start)}


def train(
    case: Case,
    model: PlainModel,
    taken_at: Callable[[int, int], list[Taken]],
    before_step: Callable[[int], None] = lambda step: None,
    moves_idle: bool = False,
) -> tuple[list[float], list[float]]:
    """Train, and return each step's loss and gradient norm.

    taken_at: the layers of a step that its i-th sequence takes. before_step: what changes the model before a step.
    Layers, heads and blocks that no sequence of a step takes are left alone, or get a step with zero gradients
    (moves_idle).
    """
    losses, norms = [], []
    for step in range(case.steps):
        before_step(step)
        numbers = range(step * case.global_batch, (step + 1) * case.global_batch)
        count = sum(len(sample(case, number).targets) for number in numbers)
        taken = [taken_at(step, index) for index in range(case.global_batch)]
        loss = sum(model.loss(case, number, layers) for number, layers in zip(numbers, taken, strict=True)) / count
        assert isinstance(loss, torch.Tensor)
        parts = {layer.place: (layer.heads, layer.blocks) for layers in taken for layer in layers}
        inner = [weight for place in sorted(parts) for weight in model.layers[place].values()]
        weights = [*model.outer.values(), *inner]
        gradients = torch.autograd.grad(loss, weights)
        total = float(torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt())
        factor = min(1.0, case.max_norm / (total + 1e-6))
        if moves_idle:
            idle_layers = [layer for place, layer in enumerate(model.layers) if place not in parts]
            still = [weight for layer in idle_layers for weight in layer.values()]
            weights, gradients = [*weights, *still], [*gradients, *map(torch.zeros_like, still)]
        idle = {
            weight: slices
            for place, (heads, blocks) in parts.items()
            for name, weight in model.layers[place].items()
            if not moves_idle and (slices := idle_slices(name, weight, heads, blocks))
        }
        for weight, gradient in zip(weights, gradients, strict=True):
            adam_step(model, weight, gradient * factor, case.learning_rate, idle.get(weight, []))
        losses.append(loss.item())
        norms.append(total)
    return losses, norms


def idle_slices(name: str, weight: torch.Tensor, heads: Parts, blocks: Parts) -> list[tuple[slice, ...]]:
    """Return where the heads and blocks that do not run lie in a weight of a layer."""
    ran = heads if name.startswith("attention.") else blocks
    if name not in {
        "attention.qkv.weight", "attention.qkv.bias", "attention.output.weight",
        "mlp.expand.weight", "mlp.expand.bias", "mlp.contract.weight",
    }:  # fmt: skip
        return []
    dim = 1 if name.endswith(("output.weight", "contract.weight")) else 0
    size = weight.shape[dim] // NUM_HEADS
    whole = (slice(None),) * dim
    return [(*whole, slice(part * size, (part + 1) * size)) for part in ALL if part not in ran]


@torch.no_grad()
def adam_step(
    model: PlainModel, weight: torch.Tensor, gradient: torch.Tensor, rate: float, idle: list[tuple[slice, ...]]
) -> None:
    """Make a step of AdamW, after which weight and moments are in the idle parts what they were."""
    state = model.states.setdefault(weight, AdamState(torch.zeros_like(weight), torch.zeros_like(weight)))
    kept = [(tensor, part, tensor[part].clone()) for part in idle for tensor in (weight, state.mean, state.square)]
    state.steps += 1
    state.mean.mul_(0.9).add_(gradient, alpha=0.1)
    state.square.mul_(0.999).add_(gradient.square(), alpha=0.001)
    mean, square = state.mean / (1 - 0.9**state.steps), state.square / (1 - 0.999**state.steps)
    if weight.ndim > 1:
        weight.mul_(1 - rate * 0.01)
    weight.sub_(rate * mean / (square.sqrt() + 1e-8))
    for tensor, part, values in kept:
        tensor[part] = values
