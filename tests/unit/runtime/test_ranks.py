"""The numbers of all ranks: who is compared with whom, when a rank is called slow, what a line has."""

import statistics

import numpy as np
import pytest
import torch

from raptr_ds.parallel.topology import Topology
from raptr_ds.runtime.host_memory import resident_bytes
from raptr_ds.runtime.ranks import Ranks, medians


def ranks_of(topology: Topology, interval: int = 1) -> Ranks:
    hosts = [f"node-{rank}" for rank in range(topology.world_size)]
    return Ranks(topology, hosts, torch.device("cpu"), interval)


def reports(seconds: list[float], memory: float = 1e9) -> np.ndarray:
    return np.array([[value, memory + rank, 2 * memory, 0.0] for rank, value in enumerate(seconds)])


@pytest.mark.parametrize("sizes", [(1, 1, 4), (2, 2, 3), (2, 1, 5), (1, 3, 2), (4, 2, 1), (1, 5, 1)])
def test_ranks_are_compared_with_those_of_their_place(sizes: tuple[int, int, int]) -> None:
    topology = Topology(*sizes)
    seconds = np.random.default_rng(0).uniform(1, 2, topology.world_size)
    for rank, median in enumerate(medians(seconds, topology)):
        pipeline, _, tensor = topology.coordinates(rank)
        places = [topology.coordinates(other) for other in range(topology.world_size)]
        like = [
            value
            for value, place in zip(seconds, places, strict=True)
            if topology.data == 1 or (place[0], place[2]) == (pipeline, tensor)
        ]
        assert median == statistics.median_low(like)


def test_unequal_stages_are_not_slow_ranks() -> None:
    """The last stage has twice the work on both of its ranks; rank 1 is slow among those of the first."""
    ranks = ranks_of(Topology(tensor=1, pipeline=2, data=3))
    for _ in range(20):
        ranks.receive(reports([1.0, 1.4, 1.0, 3.0, 3.0, 3.3]))
    assert ranks.slow is None
    line = ranks.line()
    assert (line["slowest_rank"], line["slowest_rank_seconds"], line["median_rank_seconds"]) == (1, 1.4, 1.0)


def test_a_rank_is_slow_after_20_steps_over_the_limit() -> None:
    ranks = ranks_of(Topology(1, 1, 4))
    for step in range(20):
        assert ranks.slow is None
        ranks.receive(reports([1.0, 1.0, 1.0, 31.0 if step == 3 else 1.0]))
    slow = ranks.slow
    assert slow is not None  # 50 s of 20 steps, where others take 20 s
    assert (slow.rank, slow.host, slow.seconds, slow.median, slow.ratio) == (3, "node-3", 2.5, 1.0, 2.5)
    for _ in range(20):
        ranks.receive(reports([1.0, 1.0, 1.0, 1.49]))
    assert ranks.slow is None
    for _ in range(20):
        ranks.receive(reports([1.0, 1.51, 1.0, 1.0]))
    slow = ranks.slow
    assert slow is not None
    assert slow.rank == 1


def test_an_event_is_due_once_in_100_steps() -> None:
    ranks = ranks_of(Topology(1, 1, 2))
    due = []
    for step in range(1, 251):
        ranks.receive(reports([2.0, 1.0] if step <= 230 else [1.0, 1.0]))
        if ranks.slow_event(step):
            due.append(step)
    assert due == [20, 120, 220]


def test_steps_that_were_not_measured_are_left_out() -> None:
    ranks = ranks_of(Topology(1, 1, 2))
    ranks.receive(np.zeros((2, 4)))
    assert ranks.line() == {}
    ranks.receive(reports([0.0, 5.0]))
    assert list(ranks.line()) == ["host_memory_bytes", "host_memory_peak_bytes"]
    ranks.receive(reports([2.0, 5.0]))
    assert ranks.line()["slowest_rank_seconds"] == 5.0


def test_a_line_has_the_mean_since_the_last_one_and_the_largest_memory() -> None:
    ranks = ranks_of(Topology(1, 1, 2), interval=3)
    for seconds in (100.0, 1.0, 2.0, 6.0):
        ranks.receive(reports([seconds, 0.5]))
    assert ranks.line() == {
        "slowest_rank": 0, "slowest_rank_seconds": 3.0, "median_rank_seconds": 0.5,
        "host_memory_bytes": 1_000_000_001, "host_memory_peak_bytes": 2_000_000_000,
    }  # fmt: skip


def test_a_single_rank_has_memory_only() -> None:
    ranks = ranks_of(Topology(1, 1, 1))
    for _ in range(30):
        ranks.receive(reports([1.0]))
    assert list(ranks.line()) == ["host_memory_bytes", "host_memory_peak_bytes"]
    assert ranks.slow is None


def test_own_numbers_are_reported_with_data_loading_but_without_the_first_step() -> None:
    ranks = ranks_of(Topology(1, 1, 2), interval=5)
    assert ranks.report == (0.0,) * 4
    ranks.loaded(7.0)
    ranks.step_done(41, 60.0)
    assert ranks.report[0] == 0.0
    resident, peak = ranks.report[1:3]
    assert 0 < resident <= peak
    ranks.loaded(0.25)
    ranks.step_done(42, 1.0)
    assert ranks.report == (1.25, resident, peak, 0.0)  # memory is read for lines: of steps 45, 50, ...
    kept = bytearray(64 << 20)
    ranks.step_done(43, 1.0)
    assert ranks.report[1] > resident + len(kept) / 2
    ranks.step_done(44, 0.0)
    assert ranks.report[0] == 0.0


def test_resident_memory_follows_what_is_held() -> None:
    before, _ = resident_bytes()
    held = bytearray(256 << 20)
    held[:: 1 << 12] = b"x" * len(held[:: 1 << 12])
    during, peak_during = resident_bytes()
    assert during - before > 200 << 20
    size = len(held)
    del held
    after, peak = resident_bytes()
    assert during - after > size // 2
    assert min(peak_during, peak) >= during - (1 << 20)  # Linux counts pages by thread and adds them up now and then
