"""Steps that are not finite: when a run recovers, what it prints, and how the run's state counts and rolls back."""

from dataclasses import asdict, replace

import pytest

from raptr_ds.engine.protocol import StepResult
from raptr_ds.paths import LayerPath
from raptr_ds.paths.cost import StepFlops
from raptr_ds.runtime.non_finite import MAX_ROLLBACKS_TO_ONE_STEP, may_roll_back, must_recover, what_happened
from raptr_ds.runtime.state import RunState
from tests.model_shapes import model_shape

NAN = float("nan")


@pytest.fixture
def cost() -> StepFlops:
    shape = model_shape("bert", layers=4, hidden=8, length=16, vocabulary=32, ffn=32)
    return StepFlops(shape, num_sequences=2, recompute=False)


def after(cost: StepFlops, state: RunState, skipped: str) -> RunState:
    """Return the state after steps that are skipped where `skipped` has an x."""
    for mark in skipped:
        result = StepResult(NAN, NAN, 5, skipped=True) if mark == "x" else StepResult(1.0, 1.0, 5)
        state = state.after(cost, result, LayerPath.full(4))
    return state


def recovered_at(cost: StepFlops, skipped: str, max_steps: int) -> list[int]:
    """Return the steps after which a run recovers."""
    state, found = RunState(), []
    for mark in skipped:
        state = after(cost, state, mark)
        if must_recover(state, max_steps):
            found.append(state.step)
    return found


@pytest.mark.parametrize(
    ("skipped", "max_steps", "expected"),
    [
        (".........", 1, []),
        ("..x..x..x", 1, [3, 6, 9]),
        ("..x..x..x", 2, []),
        ("xx.xxx...", 3, [6]),  # in a row: a finite step begins to count anew
        ("xxx......", 3, [3]),
        ("xxxxx", 4, [4, 5]),
        ("xxxxxxxxx", 0, []),  # never
    ],
)
def test_a_run_recovers_after_so_many_in_a_row(
    cost: StepFlops, skipped: str, max_steps: int, expected: list[int]
) -> None:
    assert recovered_at(cost, skipped, max_steps) == expected


def test_the_state_counts_skipped_steps_and_where_the_row_began(cost: StepFlops) -> None:
    state = after(cost, RunState(), "x..xx")
    assert (state.step, state.skipped_steps, state.skipped_in_row, state.last_finite_step) == (5, 3, 2, 3)
    assert state.tokens == 5 * 2 * 16  # the data of skipped steps are used up
    state = after(cost, state, ".")
    assert (state.skipped_steps, state.skipped_in_row, state.last_finite_step) == (3, 0, 6)


def test_a_rollback_goes_back_in_everything_but_data_and_skipped_steps(cost: StepFlops) -> None:
    saved = after(cost, RunState(), "x...")
    failed = after(cost, saved, "..xx")
    state = failed.rolled_back(saved)
    assert (state.step, state.tokens, state.flops, state.full_flops) == (4, saved.tokens, saved.flops, saved.full_flops)
    assert (state.skipped_steps, state.skipped_in_row) == (3, 0)
    assert state.next_sample == failed.next_sample == 2 * 8  # batches 4 to 7 are left out, and no other
    again = after(cost, state, "xx").rolled_back(saved)
    assert (again.step, again.next_sample, again.skipped_steps) == (4, 2 * 10, 5)


def test_what_rollbacks_to_different_places_leave_out_adds_up(cost: StepFlops) -> None:
    first = after(cost, RunState(), "..")
    state = after(cost, first, "x").rolled_back(first)
    second = after(cost, state, "...")
    state = after(cost, second, ".xx").rolled_back(second)
    assert (state.step, state.next_sample) == (5, 2 * 9)
    assert (state.rolled_back_to, state.rollbacks_there) == (5, 1)


def test_rollbacks_to_one_place_are_limited_and_to_another_are_not(cost: StepFlops) -> None:
    place = after(cost, RunState(), "....")
    state, rollbacks = after(cost, place, "x"), 0
    while may_roll_back(state, place.step):
        # What is restored is the state as it was saved right after the last rollback: the counts are in it.
        place = state.rolled_back(place)
        state, rollbacks = after(cost, place, "x"), rollbacks + 1
    assert rollbacks == MAX_ROLLBACKS_TO_ONE_STEP
    assert state.next_sample == 2 * (4 + rollbacks + 1)
    assert may_roll_back(state, 3)
    further = after(cost, place, "..")
    assert may_roll_back(after(cost, further, "x"), further.step)


def test_a_state_survives_its_dictionary_and_old_ones_are_read(cost: StepFlops) -> None:
    saved = after(cost, RunState(), "x.")
    state = after(cost, saved, ".x").rolled_back(saved)
    assert RunState.from_dict(asdict(state), 2) == state
    old = {"step": 7, "tokens": 70, "flops": 700, "full_flops": 1400}
    assert RunState.from_dict(old, 2) == replace(RunState(), **old, next_sample=2 * 7)
    assert RunState.from_dict({**old, "data_offset_steps": 3}, 2) == replace(RunState(), **old, next_sample=2 * 10)


def test_people_are_told_which_steps_and_numbers(cost: StepFlops) -> None:
    one = what_happened(after(cost, RunState(), "...x"), 2.5, float("inf"))
    assert one.startswith("step 4 had a loss or a gradient that is not finite (last: loss 2.5, gradient norm inf)")
    assert one.endswith("the weights are those after step 3")
    several = what_happened(after(cost, RunState(), ".xxx"), NAN, NAN)
    assert several.startswith("steps 2 to 4, 3 in a row, had a loss or a gradient that is not finite")
    assert several.endswith("the weights are those after step 1")
