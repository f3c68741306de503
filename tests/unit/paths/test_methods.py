"""Path methods: what every path obeys, statistics of the draws, and equality between processes."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from raptr_ds.config.path_sections import RaptrSection, RunSizes
from raptr_ds.paths import LayerPath, build_path_method
from raptr_ds.paths.balance import BalancedStages
from raptr_ds.paths.path import Parts
from tests.path_methods import path_method

REPOSITORY = Path(__file__).parents[3]


def raptr(**values):
    defaults = {"method": "raptr", "num_layers": 12, "num_steps": 400, "seed": 7, "schedule": "6-8-10-12"}
    return path_method(**{**defaults, **values})


def activity(method, steps):
    """Return which layer ran at which step, (steps, layers) of 0 and 1."""
    table = np.zeros((len(steps), method.num_layers), dtype=np.int64)
    for row, step in enumerate(steps):
        table[row, list(method.path_at(step).layers)] = 1
    return table


def test_full_runs_every_layer():
    method = path_method(method="full", num_layers=5, num_steps=10, seed=1)
    assert all(method.path_at(step) == LayerPath.full(5) for step in range(12))


@pytest.mark.parametrize("split", ["uniform", "proportional"])
def test_raptr_paths_have_the_scheduled_length_phase_and_fixed_layers(split):
    method = raptr(split=split, full_warmup_steps=20)
    for step in range(method.num_steps + 5):
        path, phase = method.path_at(step), method.phase_at(step)
        assert path.length == phase.path_length == pytest.approx(method.marginals_at(step).sum())
        assert path.phase == phase.index
        assert {0, 11} <= set(path.layers)
        assert path == method.path_at(step)
    assert method.path_at(0) == method.model_at(0)
    assert method.path_at(19) == method.model_at(19)
    assert method.path_at(20).length == 6
    assert method.path_at(399) == method.model_at(399)


def test_paths_are_equal_in_another_process_and_differ_by_seed_and_step():
    code = (
        "import json; from tests.path_methods import path_method\n"
        "m = path_method('raptr', num_layers=12, num_steps=400, seed=7, schedule='6-8-10-12')\n"
        "print(json.dumps([m.path_at(step).layers for step in range(0, 400, 7)]))"
    )
    environment = {"PYTHONHASHSEED": "123", "PATH": "", "PYTHONPATH": str(REPOSITORY)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    method = raptr()
    assert json.loads(run.stdout) == [list(method.path_at(step).layers) for step in range(0, 400, 7)]
    assert len({method.path_at(step) for step in range(100)}) > 50
    assert [raptr(seed=8).path_at(s) for s in range(20)] != [method.path_at(s) for s in range(20)]


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("full", {}),
        ("stacking", {"schedule": "6-12", "growth_position": "middle"}),
        ("layer_dropout", {}),
        ("pld", {"residual_scale": "inverse", "paths_per_step": 2}),
        ("layerdrop", {"residual_scale": "sqrt"}),
        ("raptr", {"residual_scale": "sqrt", "sampling": "bernoulli"}),
        ("raptr", {"residual_scale": "inverse", "sampling": "balanced", "stages": BalancedStages((5, 7), 0.5)}),
        ("raptr", {"residual_scale": "sqrt", "width_schedule": "1-2-3-4"}),
        ("width", {"schedule": "1-2-4"}),
    ],
)
def test_the_repr_of_a_path_restores_it_whatever_the_libraries(method, keys):
    """Agreement compares paths by their repr: NumPy's numbers would print its version's way."""
    built = path_method(method, num_layers=12, num_steps=40, num_heads=4, **keys)
    for step in range(40):
        path = built.path_at(step)
        assert eval(repr(path), {"LayerPath": LayerPath, "Parts": Parts}) == path


def test_a_path_does_not_depend_on_the_length_of_the_run_within_its_phase():
    assert raptr(num_steps=400).path_at(3).layers == raptr(num_steps=4000).path_at(3).layers


@pytest.mark.parametrize(
    ("method", "name", "schedule"),
    [("raptr", "late", "3-12"), ("stacking", "late", "3-12"), ("stacking", "one_expansion", "1-12")],
)
@pytest.mark.parametrize("num_steps", [1, 7, 100, 1584])
def test_schedules_that_leave_the_work_to_the_last_fifth(method, name, schedule, num_steps):
    keys = {"growth_warmup_steps": 5} if method == "stacking" else {}
    named = path_method(method, num_layers=12, num_steps=num_steps, schedule=name, **keys)
    direct = path_method(method, num_layers=12, num_steps=num_steps, schedule=schedule, split=[0.8, 0.2], **keys)
    steps = range(num_steps)
    assert [named.path_at(step).layers for step in steps] == [direct.path_at(step).layers for step in steps]
    assert [named.growth_at(step) for step in steps] == [direct.growth_at(step) for step in steps]
    assert [named.learning_rate_factor_at(step) for step in steps] == [
        direct.learning_rate_factor_at(step) for step in steps
    ]


def test_uniform_draw_gives_every_subset_the_same_chance():
    method = raptr(num_layers=6, num_steps=6000, schedule="4-6")
    counts: dict[tuple[int, ...], int] = {}
    for step in range(3000):
        layers = method.path_at(step).layers
        counts[layers] = counts.get(layers, 0) + 1
    # Two of the four free layers: 6 subsets; chi-square with 5 degrees of freedom passes 20.5 in 1 of 1000 cases.
    assert len(counts) == 6
    assert sum((count - 500) ** 2 / 500 for count in counts.values()) < 20.5


def test_uniform_draw_has_uniform_marginals_on_the_free_layers():
    table = activity(raptr(num_steps=8000), range(2000))
    assert table[:, [0, 11]].all()
    free = table[:, 1:11].sum(axis=0)
    assert free.sum() == 2000 * 4
    # Sampling without replacement: each count has variance n p (1 - p), their sum is fixed, so this statistic is
    # chi-square with 9 degrees of freedom; it passes 27.9 in 1 of 1000 cases.
    assert ((free - 800) ** 2).sum() / (2000 * 0.4 * 0.6) * (9 / 10) < 27.9


def test_bernoulli_draw_has_the_scheduled_expected_length_and_independent_layers():
    method = raptr(num_steps=8000, sampling="bernoulli")
    table = activity(method, range(2000))
    assert table[:, [0, 11]].all()
    lengths = table.sum(axis=1)
    # p = (6 - 2) / (12 - 2); length - 2 is binomial(10, 0.4): mean 4, variance 2.4. Bounds at 4 standard errors.
    assert abs(lengths.mean() - 6) < 4 * math.sqrt(2.4 / 2000)
    assert abs(lengths.var() - 2.4) < 4 * 2.4 * math.sqrt(2 / 2000)
    assert abs(table[:, 1:11].mean(axis=0) - 0.4).max() < 4 * math.sqrt(0.24 / 2000)
    assert all(method.path_at(step).length == 12 for step in range(6000, 6100))


@pytest.mark.parametrize("sampling", ["uniform", "bernoulli"])
def test_sqrt_scale_uses_the_actual_length(sampling):
    method = raptr(sampling=sampling, residual_scale="sqrt")
    for step in range(0, 400, 3):
        path = method.path_at(step)
        assert path.residual_scale == math.sqrt(12 / path.length)
    assert all(raptr(sampling=sampling).path_at(step).residual_scale == 1.0 for step in range(50))


def test_bernoulli_without_fixed_layers_may_draw_an_empty_path():
    section = RaptrSection(schedule="1-4", fixed_layers=(), sampling="bernoulli", residual_scale="sqrt")
    method = build_path_method(section, RunSizes(num_layers=4, num_steps=400), seed=7)
    empty = [path for path in map(method.path_at, range(100)) if not path.layers]
    assert empty
    assert empty[0].residual_scale == 1.0


def test_constant_depth_keeps_its_length_to_the_end():
    values = {"method": "constant", "num_layers": 12, "num_steps": 50, "seed": 1, "constant_length": 9}
    method = path_method(**values)
    assert [method.path_at(step).length for step in range(52)] == [9] * 52
    assert len({method.path_at(step).layers for step in range(50)}) > 20


def test_pld_keeps_layers_with_its_probabilities():
    values = {"num_layers": 4, "num_steps": 100000, "seed": 3, "pld_gamma": 0.001, "pld_theta": 0.5}
    method = path_method(method="pld", **values)
    # theta(t) is 1 at the start and 0.5 after thousands of steps: layer i is then kept with 1 - i/4 * 0.5.
    assert method.path_at(0) == method.model_at(0)
    assert method.marginals_at(0).sum() == 4.0
    late = activity(method, range(50000, 52000)).mean(axis=0)
    for layer in range(4):
        expected = 1 - layer / 4 * 0.5
        assert abs(late[layer] - expected) <= 4 * math.sqrt(expected * (1 - expected) / 2000)
    assert method.marginals_at(10**6).sum() == pytest.approx(4 - (0 + 1 + 2 + 3) / 4 * 0.5)
    theta_at_700 = 0.5 * math.exp(-0.7) + 0.5
    assert method.marginals_at(700).sum() == pytest.approx(4 - 1.5 * (1 - theta_at_700))
