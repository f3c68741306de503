"""The gap between the loss of a path without one layer and the full model's, by depth and by parts of a layer.

Source of the claim: Panigrahi et al., arXiv 2402.05913: for a linear residual network with layer norm at initialization
the gap is O(1/sqrt(L)); without residual connection or norm it does not fall below a constant.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from raptr_ds.markdown import markdown_table
from raptr_ds.paths.path import LayerPath
from raptr_ds.paths.raptr import draw_uniform
from raptr_ds.rng import stream, stream_key
from raptr_ds.theory.residual_network import NetworkShape, ResidualNetwork

VARIANTS = {
    "residual and norm": (True, True),
    "residual only": (True, False),
    "norm only": (False, True),
    "neither": (False, False),
}


@dataclass(frozen=True)
class StabilitySettings:
    """The experiment: gaps at initialization at `depths`, and through training at fewer, smaller ones."""

    depths: tuple[int, ...] = (4, 8, 16, 32, 64, 128)
    trained_depths: tuple[int, ...] = (4, 8, 16)
    width: int = 64
    num_inputs: int = 32
    num_classes: int = 8
    num_paths: int = 8
    examples: int = 256
    seeds: int = 8
    steps: int = 200
    learning_rate: float = 1e-3
    branch: Literal["linear", "mlp"] = "linear"


@dataclass(frozen=True)
class Gap:
    """The difference between random paths of L - 1 layers and the full model.

    absolute: the mean over paths and examples of the absolute difference of an example's losses. signed: the paths'
    mean loss minus the full model's. full_loss: the full model's mean loss.
    """

    absolute: float
    signed: float
    full_loss: float


def loss_gap(network: ResidualNetwork, x: torch.Tensor, labels: torch.Tensor, paths: Sequence[LayerPath]) -> Gap:
    """Return the gap of these paths on examples (N, num_inputs) with labels (N,)."""
    with torch.no_grad():
        full = F.cross_entropy(network(x, LayerPath.full(network.shape.num_layers)), labels, reduction="none")
        differences = torch.stack(
            [F.cross_entropy(network(x, path), labels, reduction="none") - full for path in paths]
        )
        return Gap(float(differences.abs().mean()), float(differences.mean()), float(full.mean()))


def paths_without_one_layer(num_layers: int, num_paths: int, seed: int) -> list[LayerPath]:
    """Return random paths of L - 1 layers, drawn as RaPTr draws them, no layer fixed."""
    drawn = (stream(seed, "stability", index) for index in range(num_paths))
    return [LayerPath(draw_uniform(generator, num_layers, num_layers - 1), num_layers) for generator in drawn]


def initial_gaps(settings: StabilitySettings, variant: str) -> list[Gap]:
    """Return the gap at initialization for each depth, the mean over seeds."""
    gaps = []
    for depth in settings.depths:
        found = []
        for seed in range(settings.seeds):
            x, labels = _examples(settings, seed)
            network = _network(settings, variant, depth, seed)
            found.append(loss_gap(network, x, labels, paths_without_one_layer(depth, settings.num_paths, seed)))
        gaps.append(_mean(found))
    return gaps


def gaps_in_training(settings: StabilitySettings, variant: str, depth: int, seed: int = 0) -> Iterator[tuple[int, Gap]]:
    """Train the full model on a teacher's labels by Adam; yield (step, gap) before the first step and ten times more.

    The gap is measured on held-out examples, with new paths each time.
    """
    network = _network(settings, variant, depth, seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=settings.learning_rate, fused=True)
    x, labels = _examples(settings, seed)
    every = max(1, settings.steps // 10)
    for step in range(settings.steps + 1):
        if step % every == 0:
            paths = paths_without_one_layer(depth, settings.num_paths, stream_key(seed, step))
            yield step, loss_gap(network, x, labels, paths)
        inputs, targets = _examples(settings, seed, step + 1)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(network(inputs, LayerPath.full(depth)), targets).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()


def initial_table(settings: StabilitySettings, gaps: Mapping[str, Sequence[Gap]]) -> list[str]:
    """Return a Markdown table of absolute gaps at initialization, by variant and depth, and their slopes."""
    values = {variant: [gap.absolute for gap in found] for variant, found in gaps.items()}
    rows = [
        [variant, *(f"{value:.3f}" for value in row), f"{slope(settings.depths, row):+.2f}"]
        for variant, row in values.items()
    ]
    return markdown_table(["layers", *(f"L = {depth}" for depth in settings.depths), "slope"], rows)


def training_table(gaps: Mapping[str, Mapping[int, Sequence[tuple[int, Gap]]]]) -> list[str]:
    """Return a Markdown table of the losses and gaps after training."""
    head = ["layers", "L", "steps", "full model's loss", "loss without one layer", "gap of an example, before", "after"]
    rows = []
    for variant, by_depth in gaps.items():
        for depth, curve in by_depth.items():
            (_, before), (step, after) = curve[0], curve[-1]
            losses = (after.full_loss, after.full_loss + after.signed, before.absolute, after.absolute)
            rows.append([variant, depth, step, *(f"{loss:.3f}" for loss in losses)])
    return markdown_table(head, rows)


def slope(depths: Sequence[int], gaps: Sequence[float]) -> float:
    """Return the exponent a of the fit gap = c L^a by least squares on logarithms: -0.5 is 1/sqrt(L), 0 a constant."""
    return float(np.polyfit(np.log(depths), np.log(gaps), 1)[0])


def _network(settings: StabilitySettings, variant: str, depth: int, seed: int) -> ResidualNetwork:
    residual, norm = VARIANTS[variant]
    shape = NetworkShape(
        depth, settings.width, settings.num_inputs, settings.num_classes, settings.branch, residual, norm
    )
    # Without norm the residual stream doubles its power in each layer: fp32 would overflow after a hundred layers.
    return ResidualNetwork(shape, seed).double()


def _examples(settings: StabilitySettings, seed: int, batch: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a batch of inputs and their classes by a fixed random two-layer teacher."""
    teacher = torch.Generator().manual_seed(stream_key(seed, "teacher"))
    first = torch.randn(settings.width, settings.num_inputs, generator=teacher) / settings.num_inputs**0.5
    second = torch.randn(settings.num_classes, settings.width, generator=teacher)
    data = torch.Generator().manual_seed(stream_key(seed, "stability data", batch))
    x = torch.randn(settings.examples, settings.num_inputs, generator=data)
    return x.double(), F.linear(torch.tanh(F.linear(x, first)), second).argmax(dim=1)


def _mean(gaps: Sequence[Gap]) -> Gap:
    return Gap(*(float(np.mean([getattr(gap, name) for gap in gaps])) for name in ("absolute", "signed", "full_loss")))
