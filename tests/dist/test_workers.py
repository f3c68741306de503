"""Workers: a case finds nothing of the one before it, whatever became of that, and none outlives its test."""

import multiprocessing as mp
import os
import time
from pathlib import Path

import pytest

from raptr_ds.parallel.launch import Launch, detect_launch
from tests.dist.trajectory import Case, run_case, weights_differ
from tests.dist.workers import WorkerError, run_distributed


def in_a_new_interpreter(case: Case) -> tuple[list[float], list[float]]:
    """Run a case alone; return its losses and norms."""
    outcome = run_case(detect_launch(), case)
    return outcome.losses, outcome.grad_norms


def test_a_case_is_the_same_before_and_after_another_and_in_a_new_interpreter() -> None:
    """ZeRO 3 replaces functions of torch and starts threads: the case between has none of it."""
    case = Case(zero=3, micro_batch=6, steps=3)
    other = Case(method="width", schedule="1-3-4", num_layers=3, precision="bf16", micro_batch=6, steps=3)
    first, _, again = (run_distributed(run_case, 1, each)[0] for each in (case, other, case))
    assert first.losses == again.losses
    assert weights_differ(first.weights, again.weights) == 0.0
    with mp.get_context("spawn").Pool(1) as pool:
        assert pool.apply(in_a_new_interpreter, (case,)) == (first.losses, first.grad_norms)


def threads_of_the_forked(_launch: Launch) -> int:
    """Return how many threads the process has that this one is forked from."""
    return len(list(Path(f"/proc/{os.getppid()}/task").iterdir()))


def test_workers_are_forked_from_a_process_of_one_thread() -> None:
    """A fork has none of the other threads, but all locks that these hold."""
    assert run_distributed(threads_of_the_forked, 1) == [1]


def end_badly(launch: Launch, folder: str, how: str) -> None:
    """Leave the process's number; rank 1 dies or raises, and all others hang."""
    (Path(folder) / str(launch.rank)).write_text(str(os.getpid()))
    while len(list(Path(folder).iterdir())) < 2:
        time.sleep(0.01)
    if launch.rank == 1 and how == "died":
        os._exit(3)
    if launch.rank == 1 and how == "Error":
        raise ValueError(how)
    time.sleep(600)


@pytest.mark.parametrize(
    ("how", "message"), [("died", "rank 1 of 2 failed"), ("Error", "rank 1 of 2 failed"), ("did not finish", "ranks")]
)
def test_what_ends_badly_is_named_and_leaves_no_process(how: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=f"(?s){message}.*{how}"):
        run_distributed(end_badly, 2, str(tmp_path), how, timeout=3.0)
    for rank in range(2):
        assert not Path(f"/proc/{(tmp_path / str(rank)).read_text()}").exists()
    assert run_distributed(rank_of, 2) == [0, 1]


def rank_of(launch: Launch) -> int:
    """Return the rank."""
    return launch.rank
