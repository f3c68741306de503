"""The start of a run: a rank that does not come, or a device that cannot serve, is named; nobody hangs."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from raptr_ds import pretrain
from raptr_ds.errors import AbsentRankError, ConfigError, Exit, LostRankError
from raptr_ds.parallel.groups import initialize_process_groups, make_process_groups, warm_up
from raptr_ds.parallel.launch import Launch
from raptr_ds.parallel.roll_call import RankDevice, call_roll, meet
from raptr_ds.parallel.topology import Topology
from tests.dist.trajectory import Case, build_engine
from tests.dist.workers import run_distributed

SHORT = timedelta(seconds=3)


def start_without(launch: Launch, absent: int) -> tuple[str, Exit, float]:
    """Start on all ranks but one; return the error's text, its exit code and the seconds it took."""
    if launch.rank == absent:
        return "", Exit.DONE, 0.0
    begin = time.monotonic()
    with pytest.raises(AbsentRankError) as caught:
        initialize_process_groups(launch, 1, 1, SHORT)
    return str(caught.value), caught.value.exit_code, time.monotonic() - begin


def test_a_rank_that_never_comes_is_named() -> None:
    text, exit_code, seconds = run_distributed(start_without, 2, 1, timeout=60.0)[0]
    assert "ranks 1 of 2 did not come within 3 s" in text
    assert exit_code == Exit.FAULT
    assert seconds < 20


def test_all_that_never_come_are_named() -> None:
    assert "ranks 2 of 3 did not" in run_distributed(start_without, 3, 2, timeout=60.0)[0][0]


def test_the_others_say_so_where_rank_0_never_comes() -> None:
    text, exit_code, seconds = run_distributed(start_without, 2, 0, timeout=60.0)[1]
    assert "rank 1 found nobody at 127.0.0.1:" in text
    assert exit_code == Exit.FAULT
    assert seconds < 20


def warm_up_without_rank_1(launch: Launch) -> str:
    """Come to the groups on both ranks, and to their first collective on rank 0 alone."""
    dist.init_process_group(
        "gloo", store=call_roll(launch, RankDevice(None, False), SHORT), rank=launch.rank, world_size=2
    )
    groups = make_process_groups(Topology.of(2, 1, 1), launch.rank, torch.device("cpu"))
    if launch.rank == 1:
        return ""
    with pytest.raises(AbsentRankError) as caught:
        warm_up(groups, SHORT)
    return str(caught.value)


def test_a_rank_that_is_lost_before_the_first_collective_is_named() -> None:
    text = run_distributed(warm_up_without_rank_1, 2, timeout=60.0)[0]
    assert text.startswith("not every rank came to the first collective within 3 s")
    assert "Ranks 1 failed" in text


def meet_without(launch: Launch, ended: int) -> tuple[str, Exit, float]:
    """Meet on all ranks but one, which has gone; return the error's text, its exit code and the seconds it took."""
    groups = initialize_process_groups(launch, 1, 1)
    if launch.rank == ended:
        dist.destroy_process_group()
        return "", Exit.DONE, 0.0
    begin = time.monotonic()
    with pytest.raises(LostRankError) as caught:
        meet(groups.control, timedelta(minutes=1), "the end of the run")
    return str(caught.value), caught.value.exit_code, time.monotonic() - begin


@pytest.mark.parametrize("ended", [0, 1])
def test_a_rank_that_ends_before_the_others_meet_is_lost(ended: int) -> None:
    text, exit_code, seconds = run_distributed(meet_without, 2, ended, timeout=60.0)[1 - ended]
    assert text.startswith("a rank has ended, or its host cannot be reached, before the end of the run: ")
    assert (f"Ranks {ended} failed" if ended else f"from rank {ended}") in text
    assert exit_code == Exit.LOST_RANK
    assert seconds < 30


def collectives_of_the_start(launch: Launch, tensor: int, pipeline: int) -> list[tuple[int, ...]]:
    """Return the ranks of each all-reduce that the start makes here, in order."""
    seen = []
    original = dist.all_reduce

    def observed(values: torch.Tensor, group: dist.ProcessGroup) -> None:
        seen.append(tuple(dist.get_process_group_ranks(group)))
        original(values, group=group)

    dist.all_reduce = observed
    initialize_process_groups(launch, tensor, pipeline)
    return seen


def test_every_group_of_several_ranks_is_used_once_before_training() -> None:
    found = run_distributed(collectives_of_the_start, 4, 2, 2)
    assert found[0] == [(0, 1, 2, 3), (0, 1), (0, 2), (0, 2)]  # world, tensor, pipeline, embedding
    assert found[3] == [(0, 1, 2, 3), (2, 3), (1, 3), (1, 3)]


def share_a_gpu(launch: Launch) -> str:
    """Come with the same GPU on both ranks."""
    with pytest.raises(ConfigError) as caught:
        call_roll(launch, RankDevice("GPU-1", True), SHORT)
    return str(caught.value)


def test_all_ranks_refuse_devices_that_do_not_fit() -> None:
    texts = run_distributed(share_a_gpu, 2, timeout=60.0)
    assert texts[0] == texts[1]
    assert "ranks 0, 1 of 2 share one GPU" in texts[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_whoever_is_there_says_who_is_not(
    rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 may be the one that is missing."""

    def pretend(*_arguments: object) -> Exit:
        raise AbsentRankError("ranks 2 of 3 did not come within 3 s")

    monkeypatch.setattr(pretrain, "detect_launch", lambda: Launch(rank, rank, 3, "127.0.0.1", 1, "tests"))
    monkeypatch.setattr(pretrain, "load_run_config", lambda *_arguments, **_options: None)
    monkeypatch.setattr(pretrain, "pretrain", pretend)
    assert pretrain.main(["--deepspeed_config", "x.json"]) == Exit.FAULT
    assert "ranks 2 of 3 did not come" in capsys.readouterr().err


def timeouts_of_all_groups(launch: Launch, case: Case) -> set[timedelta]:
    """Build an engine among groups that wait 7 minutes; return how long each group of this rank waits, also its own."""
    groups = initialize_process_groups(launch, case.tensor, case.pipeline, timedelta(minutes=7))
    build_engine(case, groups)
    known = list(dist.distributed_c10d._world.pg_map)
    assert len(known) > 6
    return {group._get_backend(torch.device("cpu")).options._timeout for group in known}


def test_groups_that_deepspeed_makes_wait_as_long_as_ours() -> None:
    case = Case(pipeline=2, zero=1)
    assert run_distributed(timeouts_of_all_groups, 4, case) == [{timedelta(minutes=7)}] * 4
