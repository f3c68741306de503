"""Differences of a few seeds against numbers worked out by hand and printed tables."""

import math
from statistics import stdev

import pytest

from raptr_ds.lab.paired import paired_difference

# Two-sided 95% values from printed tables of Student's t, three decimals.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 30: 2.042, 120: 1.980}


@pytest.mark.parametrize("freedom", TABLE)
def test_the_interval_has_the_half_width_of_the_tables(freedom):
    """Differences of +1 and -1, and a zero if their number is odd, have a deviation that is known."""
    n = freedom + 1
    differences = {seed: (-1.0) ** seed if seed < n - n % 2 else 0.0 for seed in range(n)}
    deviation = math.sqrt((n - n % 2) / freedom)
    found = paired_difference(differences, dict.fromkeys(differences, 0.0))
    assert found.half_width == pytest.approx(TABLE[freedom] * deviation / math.sqrt(n), abs=5e-4)


def test_differences_are_paired_by_seed():
    ours, theirs = {1: 4.0, 2: 5.0, 3: 9.5}, {3: 9.0, 2: 5.5, 1: 5.0, 4: 0.0}
    difference = paired_difference(ours, theirs)
    # -1, -0.5, +0.5: mean -1/3, squares about it 4/9 + 1/36 + 25/36 = 7/6, deviation sqrt(7/12).
    assert (difference.n, difference.num_lower) == (3, 2)
    assert difference.mean == pytest.approx(-1 / 3)
    assert difference.half_width == pytest.approx(4.3027 * math.sqrt(7 / 12) / math.sqrt(3), rel=1e-4)
    assert not difference.is_clear


def test_what_seeds_share_drops_out_of_a_difference():
    theirs = {seed: 3.0 + seed for seed in range(1, 6)}
    ours = {seed: loss - 0.1 + 0.001 * (-1) ** seed for seed, loss in theirs.items()}
    difference = paired_difference(ours, theirs)
    assert difference.is_clear
    assert difference.num_lower == 5
    assert stdev(ours.values()) > 100 * difference.half_width


def test_one_pair_has_no_interval_and_none_is_no_difference():
    assert paired_difference({1: 2.0}, {1: 1.5, 2: 1.0}).half_width is None
    assert not paired_difference({1: 2.0}, {1: 1.5}).is_clear
    assert str(paired_difference({1: 2.0}, {1: 1.5})) == "+0.5000"
    assert paired_difference({1: 2.0}, {2: 1.0}) is None
