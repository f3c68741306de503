"""Evaluation on two processes: each computes a part of the requests, and the results are those of one."""

from pathlib import Path
from typing import Any

import pytest

from raptr_ds.errors import DataError, Exit, RaptrError
from raptr_ds.parallel.groups import lone_process_groups
from raptr_ds.parallel.launch import Launch
from tests.dist.workers import run_distributed
from tests.small_tasks import write_run, write_task_files


def evaluated(launch: Launch, run: str, task_files: str) -> tuple[dict[str, Any], int]:
    """Return the results, and how many sequences this rank computed."""
    from raptr_ds.evaluation.catalogue import Catalogue
    from raptr_ds.evaluation.language_model import PrefixLM
    from raptr_ds.evaluation.ranks import joined
    from raptr_ds.evaluation.report import as_json
    from raptr_ds.evaluation.run import run_tasks
    from raptr_ds.evaluation.tasks import load_tasks
    from raptr_ds.hf.load import load_prefix_model

    done = 0

    def count(kind: str, part: int, total: int) -> None:
        nonlocal done
        done += kind == "scoring" and part == total and total

    loaded = load_prefix_model(Path(run))
    tasks = load_tasks(Catalogue(), ["boolq", "cb", "nq_open", "winogrande"], Path(task_files))
    with joined() as ranks:
        model = PrefixLM(loaded, batch_size=3, ranks=ranks, on_progress=count)
        outcomes = list(run_tasks(tasks, {"prefix": model}, (0, 2)))
    return as_json("", outcomes, {}), done


def exchange_without(launch: Launch, ranks: tuple[int, ...]) -> None:
    """Come together and exchange results, which these ranks cannot."""
    from raptr_ds.evaluation.ranks import joined

    with joined() as joint:
        if launch.rank in ranks:
            raise DataError(f"no text on rank {launch.rank}")
        joint.merge({})


def with_an_error_on(launch: Launch, ranks: tuple[int, ...]) -> tuple[str, Exit, bool]:
    """Return the error that this rank ends with, its exit code, and whether this rank prints it."""
    with pytest.raises(RaptrError) as caught:
        exchange_without(launch, ranks)
    return type(caught.value).__name__, caught.value.exit_code, caught.value.is_first


@pytest.mark.parametrize("ranks", [(0,), (1,), (0, 1), (1, 2), (0, 1, 2)])
def test_an_error_that_some_ranks_have_is_printed_by_one_of_them(ranks: tuple[int, ...]) -> None:
    ended = run_distributed(with_an_error_on, 3, ranks)
    for rank, (kind, code, _) in enumerate(ended):
        assert (kind, code) == ("DataError" if rank in ranks else "LostRankError", Exit.USER_ERROR)
    assert [rank for rank, (_, _, is_first) in enumerate(ended) if is_first] in [[rank] for rank in ranks]


def test_the_table_is_that_of_one_process(tmp_path: Path) -> None:
    """Few-shot examples and cut contexts included. Rounding: batches differ, and with them the order of sums."""
    with lone_process_groups() as groups:
        run = write_run(tmp_path, groups)
    files = write_task_files(tmp_path / "files")
    ((alone, every),) = run_distributed(evaluated, 1, str(run), str(files))
    shared = run_distributed(evaluated, 2, str(run), str(files))
    assert sum(part for _, part in shared) == every
    assert all(0.25 * every < part < 0.75 * every for _, part in shared)
    for found, _ in shared:
        assert found["tasks"] == alone["tasks"]
        for name, wanted in alone["results"].items():
            assert found["results"][name].keys() == wanted.keys()
            for metric, value in wanted.items():
                same = None if value is None else pytest.approx(value, rel=1e-5)
                assert found["results"][name][metric] == same, (name, metric)
    assert sum(entry["truncated"] for entry in alone["tasks"].values()) > 0
