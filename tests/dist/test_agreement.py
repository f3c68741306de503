"""Agreement: a rank with another path, another wish to stop or another error never makes others hang or go astray."""

import pytest

from raptr_ds.errors import AgreementError, ConfigError
from raptr_ds.parallel.agreement import PathAgreement, together
from raptr_ds.parallel.groups import initialize_process_groups
from raptr_ds.parallel.launch import Launch
from raptr_ds.paths import LayerPath
from tests.dist.workers import run_distributed


def _paths(rank: int, odd_ranks: tuple[int, ...], odd_step: int):
    def path_at(step: int) -> LayerPath:
        return LayerPath((0, 2, 3) if rank in odd_ranks and step == odd_step else (0, 1, 3), 4)

    return path_at


def agree_for_steps(launch: Launch, odd_ranks: tuple[int, ...], odd_step: int, stop_rank: int, steps: int):
    """Return (steps agreed on, stopped, the error's text)."""
    groups = initialize_process_groups(launch, 1, 1)
    stop_at = 3
    done = []
    agreement = PathAgreement(
        groups,
        _paths(launch.rank, odd_ranks, odd_step),
        lambda: launch.rank == stop_rank and len(done) >= stop_at,
        steps,
    )
    for step in range(steps):
        try:
            agreed = agreement.at(step)
        except AgreementError as error:
            return len(done), False, str(error)
        if agreed.stop:
            return len(done), True, ""
        assert agreed.path.layers == (0, 1, 3)
        done.append(step)
    return len(done), False, ""


def test_equal_paths_are_agreed_on_to_the_end() -> None:
    assert run_distributed(agree_for_steps, 3, (), -1, -1, 20) == [(20, False, "")] * 3


@pytest.mark.parametrize(
    ("odd_ranks", "named"), [((2,), "rank(s) 2 "), ((1, 2), "rank(s) 1, 2 "), ((0,), "rank(s) 1, 2 ")]
)
def test_a_different_path_stops_all_ranks_and_is_named(odd_ranks: tuple[int, ...], named: str) -> None:
    outcomes = run_distributed(agree_for_steps, 3, odd_ranks, 5, -1, 20)
    assert len(set(outcomes)) == 1
    done, stopped, message = outcomes[0]
    assert (done, stopped) == (5, False)
    assert "step 6:" in message
    assert named in message


@pytest.mark.parametrize("stop_rank", [0, 2])
def test_one_rank_asks_and_all_stop_before_the_same_step(stop_rank: int) -> None:
    outcomes = run_distributed(agree_for_steps, 3, (), -1, stop_rank, 50)
    assert len(set(outcomes)) == 1
    done, stopped, _ = outcomes[0]
    assert stopped
    assert 3 <= done <= 5  # the wish of step n is known when step n + 1 is agreed on


def agree_after_a_restart(launch: Launch, stop_rank: int) -> list[tuple[int, bool]]:
    """Agree on steps 0 to 4, go back to step 2 and on to the end; a rank asks to stop just before it goes back."""
    groups = initialize_process_groups(launch, 1, 1)
    asked, done = [False], []
    agreement = PathAgreement(groups, _paths(launch.rank, (), -1), lambda: asked[0], 8)
    for step in range(5):
        done.append((step, agreement.at(step).stop))
    asked[0] = launch.rank == stop_rank
    agreement.restart()  # step 5 is under way
    agreement.restart()  # nothing is
    for step in range(2, 8):
        done.append((step, agreement.at(step).stop))
        if done[-1][1]:
            break
    agreement.restart()  # after the last step there is nothing to forget
    return done


def test_after_a_restart_the_next_step_may_be_any() -> None:
    first = [(step, False) for step in range(5)]
    assert run_distributed(agree_after_a_restart, 3, -1) == [first + [(step, False) for step in range(2, 8)]] * 3
    # What was under way may or may not have seen the wish; step 2 does.
    assert run_distributed(agree_after_a_restart, 3, 1) == [[*first, (2, True)]] * 3


def fail_on(launch: Launch, failing: tuple[int, ...]) -> str:
    """Return the error that `together` raised here."""

    def action() -> int:
        if launch.rank in failing:
            raise ConfigError(f"wrong on rank {launch.rank}")
        return launch.rank

    groups = initialize_process_groups(launch, 1, 1)
    try:
        return str(together(groups, action))
    except ConfigError as error:
        return str(error)


def test_a_failure_anywhere_is_a_failure_everywhere() -> None:
    assert run_distributed(fail_on, 3, (2, 1)) == ["wrong on rank 1"] * 3
    assert run_distributed(fail_on, 3, ()) == ["0", "1", "2"]


def agree_with_reports(launch: Launch) -> list[list[list[float]]]:
    """Return the reports that came with steps 0 to 3; each rank passes on (its rank, the step) at each."""
    groups = initialize_process_groups(launch, 1, 1)
    agreement = PathAgreement(groups, _paths(launch.rank, (), -1), lambda: False, 6, 2)
    found = [agreement.at(step, (launch.rank, step)).reports.tolist() for step in range(4)]
    agreement.restart()
    return [*found, agreement.at(1).reports.tolist()]


def test_reports_come_with_the_next_step_to_all_ranks() -> None:
    nothing = [[0, 0]] * 3
    expected = [nothing, *([[rank, step] for rank in range(3)] for step in range(3)), nothing]
    assert run_distributed(agree_with_reports, 3) == [expected] * 3
