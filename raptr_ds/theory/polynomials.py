"""Which degrees of a polynomial a network learns by growing, constant and shrinking random paths.

The target is a sum of products of inputs +1 and -1, of equal weight in each degree; each product of degree k + 1
extends one of degree k by an input, so that learning one degree helps with the next.
Source of the claim: Panigrahi et al., arXiv 2402.05913 (RaPTr learns low degrees first and high ones at full depth;
dropping more and more layers forgets the high ones). Sizes and target are ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from raptr_ds.config.path_sections import ConstantSection, FullSection, PldSection, RaptrSection, RunSizes
from raptr_ds.markdown import markdown_table
from raptr_ds.paths import PathMethod, build_path_method
from raptr_ds.paths.path import LayerPath
from raptr_ds.rng import stream, stream_key
from raptr_ds.theory.residual_network import NetworkShape, ResidualNetwork

NUM_LAST_PATHS = 16


@dataclass(frozen=True)
class PolynomialSettings:
    """The experiment: a target of num_chains products in each degree 1..max_degree, learned from fresh examples."""

    num_inputs: int = 16
    num_chains: int = 4
    max_degree: int = 5
    num_layers: int = 8
    width: int = 48
    steps: int = 1000
    batch: int = 128
    learning_rate: float = 2e-3
    schedule: str = "2-4-6-8"
    num_evaluations: int = 15


class Target:
    """f(x) = sum over degrees k and chains j of x_{j,1} ... x_{j,k} / sqrt(num_chains), x uniform on {-1, 1}^n."""

    def __init__(self, settings: PolynomialSettings, seed: int) -> None:
        generator = stream(seed, "polynomial")
        order = [np.argsort(generator.random(settings.num_inputs)) for _ in range(settings.num_chains)]
        self.chains = torch.tensor(np.array(order)[:, : settings.max_degree])
        self.coefficient = settings.num_chains**-0.5

    def products(self, x: torch.Tensor) -> torch.Tensor:
        """Return every product, (N, num_chains, max_degree): the last index is the degree less one."""
        return x[:, self.chains].cumprod(dim=2)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return f of inputs (N, num_inputs), (N,)."""
        return self.products(x).sum(dim=(1, 2)) * self.coefficient


@dataclass(frozen=True)
class PolynomialCurve:
    """One run: the full model's error in each degree, (evaluations, max_degree), at these steps.

    An error of 1 means that nothing of the degree is learned. path_errors: the final error, the mean over the paths
    drawn in the last steps, (max_degree,). layer_steps: layers run in training, over all steps.
    """

    steps: tuple[int, ...]
    errors: np.ndarray
    path_errors: np.ndarray
    layer_steps: int


def path_methods(settings: PolynomialSettings, seed: int) -> dict[str, PathMethod]:
    """Return the training methods: `shrinking` runs the growing schedule backwards, `constant` has its mean length.

    Raises: ConfigError for a schedule that does not fit the model.
    """
    sizes = RunSizes(settings.num_layers, settings.steps)
    growing = RaptrSection(schedule=settings.schedule, fixed_layers=()).checked(sizes)
    lengths = growing.phase_lengths
    backwards = growing.model_copy(update={"schedule": "-".join(map(str, lengths[::-1]))})
    mean = round(sum(lengths) / len(lengths))
    # At half of the steps theta has covered all but a twentieth (exp(-3)) of the way to its limit.
    gamma = 6.0 / settings.steps
    return {
        "full": build_path_method(FullSection(), sizes, seed),
        "growing": build_path_method(growing, sizes, seed),
        "constant": build_path_method(ConstantSection(constant_length=mean, fixed_layers=()), sizes, seed),
        "shrinking": build_path_method(backwards, sizes, seed),
        "pld": build_path_method(PldSection(pld_gamma=gamma), sizes, seed),
    }


def degree_errors(network: ResidualNetwork, target: Target, x: torch.Tensor, path: LayerPath) -> np.ndarray:
    """Return the squared distance of a path's coefficients from the target's in each degree; without learning it is 1.

    A coefficient of the difference is its mean product with a monomial: monomials are orthonormal under uniform x.
    """
    with torch.no_grad():
        products = target.products(x)
        difference = products.sum(dim=(1, 2)) * target.coefficient - network(x, path)[:, 0]
        coefficients = (difference[:, None, None] * products).mean(dim=0)
        return coefficients.square().sum(dim=0).double().numpy()


def learn(settings: PolynomialSettings, method: PathMethod, seed: int) -> PolynomialCurve:
    """Train one network on fresh examples by Adam (skipped layers frozen); the rate decays linearly to a tenth."""
    shape = NetworkShape(settings.num_layers, settings.width, settings.num_inputs, 1)
    network = ResidualNetwork(shape, seed)
    target = Target(settings, seed)
    data = torch.Generator().manual_seed(stream_key(seed, "polynomial data"))
    held_out = _signs(8192, settings.num_inputs, torch.Generator().manual_seed(stream_key(seed, "held out")))
    optimizer = torch.optim.Adam(network.parameters(), lr=settings.learning_rate, fused=True)
    every = max(1, settings.steps // settings.num_evaluations)
    full = LayerPath.full(settings.num_layers)
    steps, errors, layer_steps = [0], [degree_errors(network, target, held_out, full)], 0
    for step in range(settings.steps):
        optimizer.param_groups[0]["lr"] = settings.learning_rate * (1.0 - 0.9 * step / settings.steps)
        x = _signs(settings.batch, settings.num_inputs, data)
        path = method.path_at(step)
        layer_steps += path.length
        loss = (network(x, path)[:, 0] - target(x)).square().mean()
        optimizer.zero_grad(set_to_none=True)  # no gradient, no step: Adam leaves skipped layers as they are
        loss.backward()
        optimizer.step()
        if (step + 1) % every == 0 or step + 1 == settings.steps:
            steps.append(step + 1)
            errors.append(degree_errors(network, target, held_out, full))
    last_paths = [method.path_at(step) for step in range(max(0, settings.steps - NUM_LAST_PATHS), settings.steps)]
    path_errors = np.mean([degree_errors(network, target, held_out, path) for path in last_paths], axis=0)
    return PolynomialCurve(tuple(steps), np.array(errors), path_errors, layer_steps)


def polynomial_table(curves: Mapping[str, list[PolynomialCurve]]) -> list[str]:
    """Return a Markdown table of the final error in each degree, the mean over seeds.

    Rows: the full model, and the last paths where training ended with shorter ones. `all`: the mean over the degrees.
    """
    first = next(iter(curves.values()))[0]
    degrees = range(1, first.errors.shape[1] + 1)
    rows = []
    all_layers = max(runs[0].layer_steps for runs in curves.values())
    for name, runs in curves.items():
        share = np.mean([run.layer_steps for run in runs]) / all_layers
        found = {"full model": np.mean([run.errors[-1] for run in runs], axis=0)}
        own = np.mean([run.path_errors for run in runs], axis=0)
        if not np.allclose(own, found["full model"]):
            found["last paths"] = own
        for evaluated, errors in found.items():
            rows.append([name, f"{share:.2f}", evaluated, *(f"{error:.3f}" for error in (*errors, errors.mean()))])
    return markdown_table(["trained by", "layers run", "evaluated", *(f"degree {k}" for k in degrees), "all"], rows)


def _signs(count: int, num_inputs: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 2, (count, num_inputs), generator=generator).float() * 2.0 - 1.0
