"""The clock of a rank's own work, by the host's time; tests/gpu has the device's."""

import time

import torch

from raptr_ds.engine.work_clock import WorkClock

WORK, WAIT = 0.05, 0.2


def clock(is_on: bool = True) -> WorkClock:
    return WorkClock(torch.device("cpu"), is_on)


def test_waiting_is_left_out() -> None:
    own = clock()
    own.begin_step()
    own.start()
    time.sleep(WORK)
    with own.waiting(), own.waiting():
        time.sleep(WAIT)
    time.sleep(WORK)
    own.stop()
    time.sleep(WAIT)
    assert 2 * WORK <= own.end_step() < 2 * WORK + WAIT


def test_only_work_counts_where_the_clock_was_not_started() -> None:
    own = clock()
    own.begin_step()
    time.sleep(WAIT)
    with own.working():
        time.sleep(WORK)
        with own.waiting():
            time.sleep(WAIT)
        with own.working():
            time.sleep(WORK)
    with own.waiting():
        time.sleep(WAIT)
    assert 2 * WORK <= own.end_step() < 2 * WORK + WAIT


def test_a_wait_that_fails_leaves_the_clock_running() -> None:
    own = clock()
    own.begin_step()
    own.start()
    try:
        with own.waiting():
            raise RuntimeError
    except RuntimeError:
        time.sleep(WORK)
    own.stop()
    assert own.end_step() >= WORK


def test_each_step_is_counted_afresh_and_evaluations_not_at_all() -> None:
    own = clock()
    own.begin_step()
    with own.working():
        time.sleep(WORK)
    assert own.end_step() >= WORK
    with own.working():  # an evaluation's forward pass
        time.sleep(WORK)
    own.begin_step()
    assert own.end_step() == 0


def test_a_rank_without_others_measures_nothing() -> None:
    own = clock(is_on=False)
    own.begin_step()
    own.start()
    with own.working():
        time.sleep(WORK)
    own.stop()
    assert own.end_step() == 0
