"""Warm-up, stable, decay: the learning rate of each step against curves by hand."""

import math

import pytest

from raptr_ds.config.optimization import complete_scheduler
from raptr_ds.engine.learning_rate import learning_rate_at


def curve(num_steps: int, **params: object) -> list[float]:
    scheduler = complete_scheduler({"type": "WarmupStableDecayLR", "params": params}, 1.0, num_steps)
    return [learning_rate_at(scheduler, 1.0, step) for step in range(num_steps)]


def test_it_rises_stays_and_falls_by_hand():
    rates = curve(20, warmup_num_steps=4, warmup_type="linear", decay_num_steps=5, decay_min_lr=0.1)
    assert rates == pytest.approx([0.25, 0.5, 0.75, *[1.0] * 12, 1.0, 0.82, 0.64, 0.46, 0.28])


@pytest.mark.parametrize(
    ("shape", "left"),
    [
        ("linear", lambda done: 1 - done),
        ("cosine", lambda done: (1 + math.cos(math.pi * done)) / 2),
        ("sqrt", lambda done: 1 - math.sqrt(done)),
    ],
)
def test_it_decays_in_three_shapes(shape, left):
    rates = curve(100, warmup_num_steps=0, decay_ratio=0.2, decay_type=shape)
    assert rates[:81] == [1.0] * 81
    assert rates[80:] == pytest.approx([left(number / 20) for number in range(20)])


def test_an_expansion_at_four_fifths_may_come_before_the_decay():
    """The phases' fractions and the schedule's ratio are of the same steps: the rate is at its peak around step 800."""
    rates = curve(1000, warmup_ratio=0.02, decay_ratio=0.1)
    assert rates[20:901] == [1.0] * 881
    assert rates[901] < 1.0
