"""The policy as a pure function: how a try ended and what it achieved, to what follows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raptr_ds.supervise.policy import (
    Cause,
    Ending,
    Failure,
    Limits,
    Start,
    cause_of,
    decide,
    failed_node,
    starts_without_progress,
)

KILLED = Failure("node2", None, "Killed")
LOST = Failure("node1", 77, "exit code 77")
MISTAKEN = Failure("node1", 2, "exit code 2")


@pytest.mark.parametrize(
    ("ending", "cause"),
    [
        (Ending(0), Cause.DONE),
        (Ending(0, stop_requested=True), Cause.DONE),
        (Ending(0, [KILLED]), Cause.DONE),  # a launcher that knows better
        (Ending(1), Cause.FAULT),
        (Ending(137), Cause.FAULT),
        (Ending(137, [KILLED]), Cause.FAULT),
        (Ending(127), Cause.FAULT),
        (Ending(2), Cause.MISTAKE),
        (Ending(137, [MISTAKEN]), Cause.MISTAKE),  # the others were killed for waiting
        (Ending(1, [MISTAKEN]), Cause.MISTAKE),  # torchrun
        (Ending(2, no_script=True), Cause.FAULT),
        (Ending(1, [MISTAKEN], no_script=True), Cause.FAULT),
        (Ending(2, folder_in_use=True), Cause.OCCUPIED),
        (Ending(1, folder_in_use=True), Cause.FAULT),
        (Ending(1, [Failure("here", 75, "exit code 75")]), Cause.STOPPED),
        (Ending(75), Cause.STOPPED),
        (Ending(138, stop_requested=True), Cause.STOPPED),
        (Ending(138), Cause.FAULT),
        (Ending(1, stop_requested=True), Cause.FAULT),
        (Ending(1, port_taken=True), Cause.PORT),
        (Ending(2, port_taken=True), Cause.MISTAKE),
        (Ending(75, port_taken=True), Cause.STOPPED),
        (Ending(74), Cause.STORAGE),
        (Ending(76), Cause.HUNG),
        (Ending(137, [Failure("node1", 76, "exit code 76")]), Cause.HUNG),
        (Ending(137, [LOST, KILLED]), Cause.FAULT),
        (Ending(77, [LOST]), Cause.FAULT),
        (Ending(77, [LOST, Failure("node2", 2, "exit code 2")]), Cause.MISTAKE),
        (Ending(137, [LOST, Failure("node2", 76, "exit code 76"), KILLED]), Cause.HUNG),
    ],
)
def test_the_cause_is_that_of_the_task_that_failed_first(ending: Ending, cause: Cause) -> None:
    assert cause_of(ending) is cause


@pytest.mark.parametrize(
    ("steps", "number", "step", "fruitless"),
    [
        ([0], 0, 0, 1),  # the first start, without a checkpoint
        ([0], 0, 10, 0),
        ([0, 10], 1, 10, 1),
        ([0, 10, 10, 10], 3, 10, 3),
        ([0, 10, 10, 10], 3, 11, 0),
        ([0, 10, 20, 30], 3, 30, 1),
        ([100, 60], 1, 70, 0),  # after a return to an older checkpoint, steps count from there
        ([100, 60], 1, 60, 2),
        ([], 0, 0, 1),
        ([], 4, 0, 5),  # nothing could be written down: Slurm's own count is what is left
        ([], -1, 0, 0),  # before the first start
    ],
)
def test_starts_are_counted_from_the_last_that_advanced(
    steps: list[int], number: int, step: int, fruitless: int
) -> None:
    starts = [Start(index, at) for index, at in enumerate(steps)]
    assert starts_without_progress(starts, number, step) == fruitless


def test_starts_that_could_not_be_written_down_count() -> None:
    assert starts_without_progress([Start(0, 0), Start(1, 10)], 4, 10) == 4
    assert starts_without_progress([Start(0, 0), Start(4, 10)], 4, 20) == 0


def test_starts_before_the_run_was_given_up_do_not_count() -> None:
    assert starts_without_progress([Start(4, 10)], 4, 10, first=4) == 1
    assert starts_without_progress([], 3, 10, first=4) == 0


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(0, 5))
def test_a_run_that_always_advances_is_always_tried_again(gains: list[int], max_retries: int) -> None:
    starts, step = [], 0
    for number, gain in enumerate(gains):
        starts.append(Start(number, step))
        step += gain
        fruitless = starts_without_progress(starts, number, step)
        decision = decide(Cause.FAULT, fruitless, Limits(max_retries))
        assert decision.retry
        assert decision.delay_seconds == 0


@given(st.lists(st.booleans(), max_size=40), st.integers(0, 5), st.sampled_from([Cause.FAULT, Cause.STOPPED]))
def test_no_more_than_the_allowed_starts_in_a_row_are_without_progress(
    advances: list[bool], max_retries: int, cause: Cause
) -> None:
    starts, step, in_a_row = [], 0, 0
    for number, advance in enumerate(advances):
        starts.append(Start(number, step))
        step += advance
        in_a_row = 0 if advance else in_a_row + 1
        decision = decide(cause, starts_without_progress(starts, number, step), Limits(max_retries))
        assert decision.retry == (in_a_row <= max_retries)
        if not decision.retry:
            break


def test_delays_grow_and_storage_gets_more_time() -> None:
    delays = [decide(Cause.FAULT, count, Limits()).delay_seconds for count in range(4)]
    assert delays == [0, 15, 60, 240]
    assert [decide(Cause.STORAGE, count, Limits()).delay_seconds for count in (1, 2, 3)] == [300, 1200, 4800]
    assert decide(Cause.STOPPED, 2, Limits()).delay_seconds == 0
    for_ever = Limits(max_retries=999_999, delay_seconds=0.0)
    assert decide(Cause.FAULT, 10_000, for_ever).delay_seconds == 0


@pytest.mark.parametrize("cause", Cause)
def test_an_end_says_why(cause: Cause) -> None:
    decision = decide(cause, 4, Limits())
    assert not decision.retry
    assert decision.why
    assert ("RAPTR_MAX_RETRIES=3" in decision.why) == (cause not in (Cause.DONE, Cause.MISTAKE))


def test_done_and_mistakes_are_never_tried_again() -> None:
    assert not decide(Cause.DONE, 0, Limits(10)).retry
    assert not decide(Cause.MISTAKE, 0, Limits(10)).retry


@pytest.mark.parametrize(
    ("ending", "node"),
    [
        (Ending(1), None),
        (Ending(137, [KILLED, Failure("node1", 1, "")]), "node2"),
        (Ending(1, [Failure(None, 1, "")]), None),
        (Ending(137, [Failure("node1", 76, ""), Failure("node3", 76, ""), KILLED]), "node2"),  # stopped, then killed
        (Ending(76, [Failure("node1", 76, ""), Failure("node3", 76, "")]), None),
        (Ending(137, [Failure("node1", 76, ""), KILLED, Failure("node3", None, "Killed")]), None),
        (Ending(75, [Failure("node1", 75, "")]), None),
        (Ending(137, [LOST, KILLED]), "node2"),  # its end was reported after that of the task which lost it
        (Ending(137, [KILLED, LOST]), "node2"),
        (Ending(77, [LOST, LOST]), None),  # the network between two nodes
        (Ending(137, [LOST, Failure("node3", 76, ""), KILLED]), "node2"),
    ],
)
def test_the_node_to_blame(ending: Ending, node: str | None) -> None:
    assert failed_node(ending, cause_of(ending)) == node
