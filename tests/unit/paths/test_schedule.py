"""Phases: boundaries and rounding."""

from fractions import Fraction
from itertools import pairwise

import pytest

from raptr_ds.paths.schedule import phase_at, split_phases


@pytest.mark.parametrize("split", ["uniform", "proportional"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_phase_at_the_start_around_each_boundary_at_the_last_step_and_beyond(split, warmup):
    phases = split_phases((6, 8, 10, 12), 12, 103, split, warmup)
    assert phase_at(phases, 0) is phases[0]
    for before, after in pairwise(phases):
        assert phase_at(phases, after.first_step - 1) is before
        assert phase_at(phases, after.first_step) is after
    assert phase_at(phases, 102) is phases[-1]
    assert phase_at(phases, 103) is phases[-1]
    assert phase_at(phases, 10**9) is phases[-1]
    with pytest.raises(AssertionError):
        phase_at(phases, -1)


def test_uniform_split_in_numbers():
    phases = split_phases((6, 8, 10, 12), 12, 400)
    assert [(p.index, p.path_length, p.first_step, p.end_step) for p in phases] == [
        (0, 6, 0, 100), (1, 8, 100, 200), (2, 10, 200, 300), (3, 12, 300, 400),
    ]  # fmt: skip


def test_proportional_split_in_numbers():
    phases = split_phases((6, 8, 10, 12), 12, 360, "proportional")
    assert [p.num_steps for p in phases] == [60, 80, 100, 120]


def test_phases_by_a_power_of_their_number_and_by_fractions():
    def steps(split, lengths=(1, 2, 3, 4), num_steps=300):
        return [phase.num_steps for phase in split_phases(lengths, 4, num_steps, split)]

    assert steps("power:1") == [30, 60, 90, 120]
    assert steps("power:2") == [10, 40, 90, 160]
    assert steps("power:0") == steps("uniform")
    shares = [number**0.5 for number in (1, 2, 3, 4)]
    assert steps("power:0.5", num_steps=30000) == pytest.approx([30000 * s / sum(shares) for s in shares], abs=1)
    assert steps((0.8, 0.2), (1, 4), 60000) == [48000, 12000]
    assert steps((0.1, 0.2, 0.7), (1, 2, 4), 10) == [1, 2, 7]


def test_warm_up_is_a_full_phase_before_the_schedule():
    phases = split_phases((2, 4), 4, 30, full_warmup_steps=10)
    assert [(p.path_length, p.first_step, p.end_step) for p in phases] == [(4, 0, 10), (2, 10, 20), (4, 20, 30)]


def test_warm_up_longer_than_the_run_takes_all_of_it():
    phases = split_phases((2, 4), 4, 5, full_warmup_steps=30000)
    assert phases[-1].end_step == 5
    assert {phase_at(phases, step).path_length for step in range(7)} == {4}


@pytest.mark.parametrize("split", ["uniform", "proportional"])
@pytest.mark.parametrize("lengths", [(3,), (1, 3), (2, 3, 3, 1, 3), (6, 8, 10, 12)])
def test_steps_are_covered_once_and_each_end_is_within_half_a_step_of_its_fraction(split, lengths):
    weights = lengths if split == "proportional" else (1,) * len(lengths)
    for num_steps in range(1, 60):
        for warmup in (0, 1, 13):
            phases = split_phases(lengths, max(lengths), num_steps, split, warmup)
            covered = [step for phase in phases for step in range(phase.first_step, phase.end_step)]
            assert covered == list(range(num_steps))
            indices = [phase_at(phases, step).index for step in covered]
            assert indices == sorted(indices)
            done = min(warmup, num_steps)
            for i, phase in enumerate(phases[-len(lengths) :]):
                exact = done + Fraction(sum(weights[: i + 1]), sum(weights)) * (num_steps - done)
                assert abs(phase.end_step - exact) <= Fraction(1, 2)
