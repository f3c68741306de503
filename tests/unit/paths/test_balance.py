"""Balanced paths: the least slowest stage against brute force, marginals by enumeration and by statistics."""

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from raptr_ds.paths.balance import BalancedStages, balanced_marginals, mean_counts, systematic_counts
from tests.path_methods import path_method

# layers of each stage, cost of the head, fixed layers, path length
CASES = [
    ((2, 2), 0.0, (0,), 3),
    ((3, 2, 3), 0.0, (0, 7), 4),
    ((2, 2, 2, 2), 0.0, (0, 7), 6),
    ((2, 2, 2, 2), 1.2, (0, 7), 5),
    ((2, 3, 3, 2), 0.46, (0, 9), 7),
    ((1, 5), 0.0, (), 3),
    ((3, 3, 3), 4.0, (), 5),
    ((3, 3, 3), 0.5, (0, 1, 2), 5),
    ((4,), 1.0, (0,), 2),
]


def offsets_of(means):
    """Return the offsets that a draw may have."""
    denominator = math.lcm(*(mean.denominator for mean in means))
    return [Fraction(number, denominator) for number in range(denominator)]


def enumerate_paths(stages, fixed, length):
    """Return the exact probability of each path, over all orders, offsets and subsets that the draw may use."""
    means = mean_counts(stages, fixed, length)
    free = [[layer for layer in layers if layer not in fixed] for layers in stages.layers()]
    orders = list(itertools.permutations(range(len(free))))
    offsets = offsets_of(means)
    vectors = Counter(tuple(systematic_counts(means, order, offset)) for order in orders for offset in offsets)
    paths: dict[tuple[int, ...], Fraction] = {}
    for vector, times in vectors.items():
        choices = [list(itertools.combinations(layers, n)) for layers, n in zip(free, vector, strict=True)]
        share = Fraction(times, len(orders) * len(offsets) * math.prod(map(len, choices)))
        for parts in itertools.product(*choices):
            path = tuple(sorted((*fixed, *itertools.chain(*parts))))
            paths[path] = paths.get(path, Fraction(0)) + share
    return paths


def largest_load(stages, path):
    counts = [sum(layer in layers for layer in path) for layers in stages.layers()]
    return max([*counts[:-1], counts[-1] + stages.head_cost])


@pytest.mark.parametrize(("layers", "head", "fixed", "length"), CASES)
def test_enumerated_paths_have_the_marginals_and_the_least_slowest_stage(layers, head, fixed, length):
    stages = BalancedStages(layers, head)
    paths = enumerate_paths(stages, fixed, length)
    assert sum(paths.values()) == 1
    assert {len(path) for path in paths} == {length}
    total = sum(layers)
    exact = [sum(p for path, p in paths.items() if layer in path) for layer in range(total)]
    assert balanced_marginals(stages, fixed, length).tolist() == [float(p) for p in exact]
    free = [layer for layer in range(total) if layer not in fixed]
    every = [(*fixed, *rest) for rest in itertools.combinations(free, length - len(fixed))]
    least = min(largest_load(stages, path) for path in every)
    assert max(largest_load(stages, path) for path in paths) <= least + 1e-9
    # As equal as that allows: the smallest marginal is the largest that any mixture of such paths has.
    lightest = [path for path in every if largest_load(stages, path) <= least + 1e-9]
    assert set(paths) <= {tuple(sorted(path)) for path in lightest}
    for layers_of_stage in stages.layers():
        in_stage = [layer for layer in layers_of_stage if layer in free]
        most = max((sum(layer in path for layer in in_stage) for path in lightest), default=0)
        for layer in in_stage:
            # A layer with less than another one's marginal is in a stage that always holds its most.
            assert exact[layer] * len(in_stage) == most or exact[layer] == max(exact[other] for other in free)


def test_the_trade_that_fixed_layers_force():
    stages = BalancedStages((6, 6, 6, 6))
    marginals = balanced_marginals(stages, (0, 23), 12)
    assert marginals[[0, 23]].tolist() == [1.0, 1.0]
    assert set(marginals[1:6]) | set(marginals[18:23]) == {2 / 5}
    assert set(marginals[6:18]) == {3 / 6}
    assert marginals.sum() == pytest.approx(12)


def test_what_does_not_divide_goes_to_stages_at_random():
    stages = BalancedStages((6, 6, 6, 6))
    means = mean_counts(stages, (), 14)
    assert means == (Fraction(7, 2),) * 4
    orders, offsets = itertools.permutations(range(4)), (Fraction(0), Fraction(1, 2))
    vectors = {tuple(systematic_counts(means, order, offset)) for order in orders for offset in offsets}
    assert vectors == {v for v in itertools.product((3, 4), repeat=4) if sum(v) == 14}
    # With room in all stages marginals are equal, whatever the fixed layers took.
    assert set(balanced_marginals(stages, (0, 23), 21)[1:23]) == {19 / 22}


def test_the_head_counts_as_load():
    # Without fixed layers: loads 4, 4, 4 and 2 + 1.2 are the least maximum for 14 layers, 4 + 1.2 is avoided.
    stages = BalancedStages((6, 6, 6, 6), head_cost=1.2)
    means = mean_counts(stages, (), 14)
    assert means == (4, 4, 4, 2)


def test_what_fixed_layers_and_head_fill_leaves_the_other_layers_of_their_stage_out():
    # BERT-base on four stages: the head is half a layer, so that the last stage has room for its fixed layer alone.
    marginals = balanced_marginals(BalancedStages((3, 3, 3, 3), head_cost=0.46), (0, 11), 6)
    assert marginals[9:].tolist() == [0.0, 0.0, 1.0]
    assert marginals[1:9].tolist() == [0.5] * 8
    heavy = BalancedStages((6, 6, 6, 6), head_cost=20.0)
    assert balanced_marginals(heavy, (), 12).tolist() == [12 / 18] * 18 + [0.0] * 6


@pytest.mark.parametrize("length", range(3, 25))
def test_counts_differ_by_one_at_most_without_head_and_fixed_layers(length):
    means = mean_counts(BalancedStages((6, 6, 6, 6)), (), length)
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        drawn = systematic_counts(means, order, offsets_of(means)[-1])
        assert max(drawn) - min(drawn) <= 1
        assert sum(drawn) == length


def method_of(stages, **values):
    defaults = {"method": "raptr", "num_layers": 12, "num_steps": 8000, "seed": 5, "schedule": "7-12"}
    return path_method(**{**defaults, "sampling": "balanced", "stages": stages, **values})


@pytest.mark.parametrize("stages", [BalancedStages((3, 3, 3, 3)), BalancedStages((5, 7), head_cost=1.5)])
def test_drawn_paths_have_the_marginals(stages):
    method = method_of(stages)
    table = np.zeros((3000, 12))
    for step in range(3000):
        path = method.path_at(step)
        assert path.length == 7
        assert path == method.path_at(step)
        table[step, list(path.layers)] = 1
    marginals = method.marginals_at(0)
    # 12 means, each within 4 standard errors: passes wrongly refused in about 1 of 1,000 choices of the seed.
    assert (np.abs(table.mean(axis=0) - marginals) <= 4 * np.sqrt(marginals * (1 - marginals) / 3000)).all()
    assert method.path_at(7000) == method.model_at(7000)
    assert method.marginals_at(7000).tolist() == [1.0] * 12


def test_over_one_stage_paths_are_uniform_samplings_own():
    balanced = method_of(BalancedStages((12,), head_cost=3.0))
    uniform = method_of(None, sampling="uniform")
    assert [balanced.path_at(step) for step in range(60)] == [uniform.path_at(step) for step in range(60)]
    assert balanced.marginals_at(3).tolist() == uniform.marginals_at(3).tolist()


def test_balanced_over_four_is_balanced_over_two():
    method = method_of(BalancedStages((3, 3, 3, 3)), schedule="8-12")
    halves = {
        tuple(len(p.active_in(half)) for half in (range(6), range(6, 12))) for p in map(method.path_at, range(99))
    }
    assert halves == {(4, 4)}


@pytest.mark.parametrize("stages", [None, BalancedStages((3, 3))])
def test_balanced_needs_the_stages_of_this_model(stages):
    with pytest.raises(AssertionError):
        method_of(stages)
    assert method_of(None, sampling="bernoulli").path_at(0)


@pytest.mark.parametrize(
    "values",
    [
        {"method": "full"},
        {"method": "pld"},
        {"method": "layerdrop", "layerdrop": 0.4},
        {"method": "stacking", "schedule": "3-6-12"},
        {"method": "raptr", "schedule": "6-12", "full_warmup_steps": 3},
        {"method": "raptr", "schedule": "6-12", "sampling": "bernoulli"},
        {"method": "constant", "constant_length": 9, "fixed_layers": [0, 5, -1]},
        {"method": "constant", "constant_length": 9, "sampling": "balanced", "stages": BalancedStages((6, 6))},
    ],
)
def test_marginals_add_up_to_the_expected_work(values):
    method = path_method(num_layers=12, num_steps=100, seed=1, **values)
    for step in (0, 2, 3, 49, 50, 99, 120):
        marginals = method.marginals_at(step)
        if step < 100:
            expected = method.expected_layers_from(step) - method.expected_layers_from(step + 1)
            assert marginals.sum() == pytest.approx(expected, rel=1e-9)
        assert ((marginals >= 0) & (marginals <= 1)).all()
