"""The pipeline simulator against closed forms, bounds, and an example by hand."""

import numpy as np
import pytest

from raptr_ds.planner.simulator import SCHEDULES, pipeline_seconds


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 8, 64])
@pytest.mark.parametrize("num_micro_batches", [1, 3, 8, 32])
@pytest.mark.parametrize("schedule", ["1f1b", "deepspeed"])
def test_equal_stages_take_the_closed_form(num_stages, num_micro_batches, schedule):
    for forward, backward in ((1.0, 2.0), (2.0, 1.0), (1.5, 1.5)):
        times = pipeline_seconds(
            np.full(num_stages, forward), np.full(num_stages, backward), num_micro_batches, schedule=schedule
        )
        assert times.shape == (num_stages,)
        assert times.max() == pytest.approx((num_micro_batches + num_stages - 1) * (forward + backward))


@pytest.mark.parametrize(("num_stages", "num_micro_batches"), [(2, 2), (2, 6), (4, 4), (4, 32), (8, 16), (64, 64)])
@pytest.mark.parametrize("num_chunks", [2, 3, 4])
def test_interleaving_divides_the_bubble(num_stages, num_micro_batches, num_chunks):
    parts = num_stages * num_chunks
    forward, backward = np.full(parts, 1.0 / num_chunks), np.full(parts, 2.0 / num_chunks)
    times = pipeline_seconds(forward, backward, num_micro_batches, num_chunks=num_chunks, schedule="interleaved")
    assert times.max() == pytest.approx(3.0 * num_micro_batches + 3.0 * (num_stages - 1) / num_chunks)


def test_by_hand():
    # Two stages, two micro batches. Stage 0: F0 0-1, F1 1-2; stage 1: F0 1-4, B0 4-7, F1 7-10, B1 10-13; stage 0:
    # B0 7-9, B1 13-15.
    times = pipeline_seconds(np.array([1.0, 3.0]), np.array([2.0, 3.0]), 2)
    assert times.tolist() == [15.0, 13.0]
    # Each transfer of half a second is on the critical path: one activation there, one gradient back.
    assert pipeline_seconds(np.array([1.0, 3.0]), np.array([2.0, 3.0]), 2, 0.5).tolist() == [16.0, 13.5]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_unequal_stages_stay_between_the_bounds(schedule):
    rng = np.random.default_rng(0)
    forward = rng.integers(0, 7, (200, 6)).astype(float)
    backward = 2 * forward
    for num_micro_batches in (1, 6, 12):
        times = pipeline_seconds(forward, backward, num_micro_batches, schedule=schedule).max(axis=-1)
        both = forward + backward
        # A stage does all micro batches, after the first one's way forward to it and before the last one's way back;
        # a single micro batch passes every stage twice; and no stage is slower than the slowest.
        before = both.cumsum(axis=-1) - both
        assert (times >= (before + num_micro_batches * both).max(axis=-1) - 1e-9).all()
        assert (times >= both.sum(axis=-1) - 1e-9).all()
        assert (times <= (num_micro_batches + 5) * both.max(axis=-1) + 1e-9).all()


def test_many_paths_at_once_are_each_alone():
    rng = np.random.default_rng(1)
    forward = rng.random((5, 8))
    together = pipeline_seconds(forward, 2 * forward, 8, 0.01, num_chunks=2, schedule="interleaved")
    for row, alone in enumerate(forward):
        single = pipeline_seconds(alone, 2 * alone, 8, 0.01, num_chunks=2, schedule="interleaved")
        assert single == pytest.approx(together[row], rel=1e-12)


def test_waiting_senders_are_never_faster():
    rng = np.random.default_rng(2)
    forward = rng.random((50, 5))
    eager = pipeline_seconds(forward, 2 * forward, 9, 0.05).max(axis=-1)
    waiting = pipeline_seconds(forward, 2 * forward, 9, 0.05, schedule="deepspeed").max(axis=-1)
    assert (waiting >= eager - 1e-9).all()


def test_transfers_make_it_slower_and_skipped_stages_cost_only_them():
    idle = pipeline_seconds(np.array([1.0, 0.0, 1.0]), np.array([2.0, 0.0, 2.0]), 1, 0.25)
    assert idle.max() == pytest.approx(1 + 1 + 2 + 2 + 4 * 0.25)
