"""Medians of ratios and their intervals, against tables and simulated noise."""

import numpy as np
import pytest

from raptr_ds.bench.samples import MedianRatio


@pytest.mark.parametrize(("count", "low", "high"), [(5, 1, 5), (6, 1, 6), (9, 2, 8), (15, 4, 12), (20, 6, 15)])
def test_the_interval_is_the_tables(count: int, low: int, high: int) -> None:
    """The ranks that tables of the sign test give for 95%."""
    samples = [float(rank) for rank in np.random.default_rng(0).permutation(count) + 1]
    found = MedianRatio.of(samples, [1.0] * count)
    assert (found.low, found.value, found.high) == (low, (count + 1) / 2, high)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Where single steps come late by a skewed, heavy-tailed amount, as on a busy machine."""
    draw = np.random.default_rng(1)
    truth, hits, rounds = 2.0, 0, 2000
    for _ in range(rounds):
        late = np.exp(0.2 * draw.standard_t(2, size=(2, 15)))
        found = MedianRatio.of(list(truth * late[0]), list(late[1]))
        hits += found.low <= truth <= found.high
    assert 0.95 <= hits / rounds <= 0.985


def test_what_slows_a_whole_round_down_cancels() -> None:
    found = MedianRatio.of([2.0, 200.0, 2.0], [1.0, 100.0, 1.0], unit=4.0)
    assert (found.low, found.value, found.high) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("aim", "says"),
    [
        (0.90, "reached"),
        (0.93, "reached, within the noise"),
        (0.96, "missed, within the noise"),
        (0.99, "missed"),
    ],
)
def test_the_verdict_knows_the_noise(aim: float, says: str) -> None:
    assert MedianRatio(0.95, 0.92, 0.97).against(aim) == says


def test_samples_of_different_rounds_have_a_wider_interval() -> None:
    """What slows rounds down cancels within them, and does not between them."""
    rounds = [1.0 + number / 10 for number in range(11)]
    twice = [2 * seconds for seconds in rounds]
    within, apart = MedianRatio.of(twice, rounds, unit=4.0), MedianRatio.of_separate(twice, rounds, unit=4.0)
    assert within.value == within.low == within.high == apart.value == 0.5
    assert apart.low < 0.45
    assert apart.high > 0.55
