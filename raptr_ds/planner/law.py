"""What a saving of FLOPs costs or brings, by a law fitted to the runs in experiments/results.

The law: a model of E, A, c that has seen D tokens for each parameter of its layers, on paths that save a share s of the
FLOPs, has the held-out loss

    L = E + A (e D) ** -b,    e = exp(s (c + d ln D) + q s ** 2).

e is what a token on such paths counts, in tokens on the full model. E, A and c are each model's own; b, d and q are
the same for all. The fit is by least squares; intervals are Student's, at 95%, of what follows from the parameters'
covariance to first order. They hold for runs like those that were measured, and say nothing of the law being wrong.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

OBJECTIVES = ("ul2",)
"""Whose runs follow the law; BERT's losses fall from plateau to plateau (docs/results.md)."""

CONFIDENCE = 0.95
_SHARED, _OWN = 3, 3  # b, d, q; then c, E, A of each model


@dataclass(frozen=True)
class Measured:
    """The end of a run, a mean over its seeds. tokens: for each parameter of the layers; saving: share of the FLOPs."""

    model: str
    layer_parameters: int
    tokens: float
    saving: float
    loss: float


@dataclass(frozen=True)
class Expected:
    """An expected difference of held-out losses, RaPTr's less the standard run's, and the ends of its interval."""

    mean: float
    least: float
    most: float

    def __str__(self) -> str:
        """The difference with its interval."""
        return f"{self.mean:+.3f} ({self.least:+.3f} to {self.most:+.3f})"


@dataclass(frozen=True)
class Law:
    """The fitted law. parameters: b, d, q, then c, E, A of each of `models`; residual: deviation of the runs from it.

    longest, longest_model: tokens a parameter of the longest standard run, and its model. shortest: of the shortest.
    Both are of models with more runs than parameters of their own, which few runs do not determine. largest: parameters
    of the layers of the largest model.
    """

    models: tuple[str, ...]
    parameters: np.ndarray
    covariance: np.ndarray
    degrees_of_freedom: int
    residual: float
    longest: float
    longest_model: str
    shortest: float
    largest: int

    def at_equal_flops(self, model: str, tokens: float, saving: float) -> Expected:
        """Return the difference where the standard run has `tokens` a parameter, and RaPTr more for the same FLOPs."""
        return self._expected(model, tokens, tokens / (1 - saving), saving)

    def at_equal_tokens(self, model: str, tokens: float, saving: float) -> Expected:
        """Return the difference where both see as many tokens."""
        return self._expected(model, tokens, tokens, saving)

    def best_saving(self, model: str, tokens: float, savings: Iterable[float]) -> float | None:
        """Return the saving to choose of some, for the FLOPs of a standard run with `tokens` a parameter.

        It is the one with the least upper end of the expected difference, so that where little is known less is
        risked; None if no upper end is below 0.
        """
        ends = {saving: self.at_equal_flops(model, tokens, saving).most for saving in savings}
        best = min(ends, key=ends.__getitem__)
        return best if ends[best] < 0 else None

    def _expected(self, model: str, standard: float, ours: float, saving: float) -> Expected:
        place = self.models.index(model)

        def difference(parameters: np.ndarray) -> float:
            losses = _losses(parameters, np.array([place] * 2), np.array([ours, standard]), np.array([saving, 0.0]))
            return float(losses[0] - losses[1])

        mean = difference(self.parameters)
        slope = _gradient(difference, self.parameters)
        deviation = math.sqrt(max(float(slope @ self.covariance @ slope), 0.0))
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, self.degrees_of_freedom)) * deviation
        return Expected(mean, mean - half, mean + half)


def fit_law(runs: Sequence[Measured]) -> Law:
    """Fit the law. Raises: ValueError if there are too few runs, or the fit does not converge."""
    models = tuple(dict.fromkeys(run.model for run in runs))
    places = np.array([models.index(run.model) for run in runs])
    tokens, savings, losses = (np.array([getattr(run, name) for run in runs]) for name in ("tokens", "saving", "loss"))
    start = [0.4, 0.0, 0.0]
    least = [0.01, -np.inf, -np.inf]
    for place in range(len(models)):
        own = losses[places == place]
        start += [0.0, 0.6 * float(own.min()), 0.3 * float(own.min())]
        least += [-np.inf, 0.0, 0.0]
    if len(runs) <= len(start):
        raise ValueError(f"{len(runs)} runs do not determine the law's {len(start)} parameters")
    found = optimize.least_squares(
        lambda parameters: _losses(parameters, places, tokens, savings) - losses,
        start,
        bounds=(least, np.inf),
        x_scale="jac",
        max_nfev=10_000,
    )
    if not found.success:
        raise ValueError(f"the law does not fit: {found.message}")
    degrees = len(runs) - len(start)
    variance = float(found.fun @ found.fun) / degrees
    covariance = np.linalg.pinv(found.jac.T @ found.jac) * variance
    determined = np.bincount(places)[places] > _OWN
    if not (determined & (savings == 0)).any():
        raise ValueError(f"no model has a standard run and more than {_OWN} runs in all")
    standard = np.where(determined & (savings == 0), tokens, 0)
    return Law(
        models,
        found.x,
        covariance,
        degrees,
        math.sqrt(variance),
        longest=standard.max(),
        longest_model=models[places[standard.argmax()]],
        shortest=standard[standard > 0].min(),
        largest=max(run.layer_parameters for run in runs),
    )


def _losses(parameters: np.ndarray, places: np.ndarray, tokens: np.ndarray, savings: np.ndarray) -> np.ndarray:
    b, d, q = parameters[:_SHARED]
    c, floor, height = parameters[_SHARED:].reshape(-1, _OWN)[places].T
    counted = np.exp(savings * (c + d * np.log(tokens)) + q * savings**2) * tokens
    return floor + height * counted**-b


def _gradient(function: Callable[[np.ndarray], float], at: np.ndarray) -> np.ndarray:
    slope = np.empty_like(at)
    for place in range(len(at)):
        step = np.zeros_like(at)
        step[place] = 1e-6 * max(abs(float(at[place])), 1e-3)
        slope[place] = (function(at + step) - function(at - step)) / (2 * step[place])
    return slope
