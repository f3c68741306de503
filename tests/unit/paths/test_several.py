"""Several paths in one step."""

import numpy as np
import pytest

from tests.path_methods import path_method

METHODS = [
    {"method": "raptr", "schedule": "3-6", "residual_scale": "sqrt"},
    {"method": "constant", "constant_length": 4, "sampling": "bernoulli"},
    {"method": "layerdrop", "layerdrop": 0.4},
    {"method": "pld", "pld_gamma": 0.01},
]


def build(values, **more):
    return path_method(num_layers=6, num_steps=400, seed=5, **values, **more)


@pytest.mark.parametrize("values", METHODS)
def test_each_draw_is_one_of_the_method_and_the_first_is_the_runs_own(values):
    alone, several = build(values), build(values, paths_per_step=3)
    lengths = set()
    for step in (0, 1, 100, 250, 399):
        first, *others = several.path_at(step).shares
        assert first == alone.path_at(step)
        assert len(others) == 2
        assert {share.phase for share in others} == {first.phase}
        lengths |= {share.length for share in others}
        assert (several.marginals_at(step) == alone.marginals_at(step)).all()
        assert several.expected_layers_from(step) == alone.expected_layers_from(step)
        assert several.model_at(step) == alone.model_at(step)
    if values["method"] == "raptr":
        assert lengths == {3, 6}


@pytest.mark.parametrize("values", METHODS)
def test_draws_have_the_methods_marginals_and_are_independent(values):
    several = build(values, paths_per_step=2)
    steps = range(200)  # raptr's first phase
    active = np.array([[[s.is_active(n) for n in range(6)] for s in several.path_at(step).shares] for step in steps])
    expected = np.mean([several.marginals_at(step) for step in steps], axis=0)
    assert np.abs(active.mean(axis=0) - expected).max() < 4 * 0.5 / np.sqrt(200)
    together = (active[:, 0] & active[:, 1]).mean(axis=0)
    assert np.abs(together - expected**2).max() < 4 * 0.5 / np.sqrt(200)
    assert (active[:, 0] != active[:, 1]).any()


def test_one_path_for_each_step_is_the_method_itself():
    assert build(METHODS[0], paths_per_step=1) == build(METHODS[0])
