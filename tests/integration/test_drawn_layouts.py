"""Some of the cases that `make soak-layouts` draws, and that it would notice a layout that trains something else."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from raptr_ds.runtime.events import read_events
from raptr_ds.runtime.metrics_file import ROLLED_BACK
from tests.integration.conftest import lines_of
from tests.soak.accidents import overflow
from tests.soak.case import Changed, Continued, Overflowing, Restarted, Struck, Trained, drawn_case
from tests.soak.drawn import Draw

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("seed", "kind"), [("A", Continued), ("E", Changed)])
def test_a_drawn_run_comes_to_the_same_in_drawn_layouts(
    data_folder: Path, tmp_path: Path, seed: str, kind: type
) -> None:
    case = drawn_case(seed, tmp_path, data_folder)
    assert type(case) is kind
    assert case.differences() == [], case


@pytest.mark.parametrize(("seed", "kind"), [("G", Struck), ("restart-6", Restarted)])
def test_a_drawn_run_that_is_killed_comes_to_the_same(data_folder: Path, tmp_path: Path, seed: str, kind: type) -> None:
    case = drawn_case(seed, tmp_path, data_folder)
    assert type(case) is kind
    assert case.differences() == [], case
    starts = [event for event in read_events(tmp_path / "struck") if event["event"] == "start"]
    assert len(starts) == 2, "the run was over before it was struck"


def test_a_drawn_run_rolls_back_to_the_same_in_another_layout(data_folder: Path, tmp_path: Path) -> None:
    case = drawn_case("overflow-70", tmp_path, data_folder)
    assert isinstance(case, Overflowing)
    case.overflow = partial(overflow, 31)  # of this corpus
    assert case.differences() == [], case
    assert lines_of(tmp_path / "first", ROLLED_BACK)


def test_a_layout_that_trains_something_else_is_noticed(data_folder: Path, tmp_path: Path) -> None:
    case = Trained(Draw("A"), tmp_path, data_folder)
    assert case.precision == "fp32"
    rate = {"optimizer.params": {**case.run["optimizer.params"], "lr": 0.9}}
    first = case.layouts[0]
    case.layouts[0] = replace(first, keys=first.keys | rate)
    wrong = case.differences()
    assert any("first, step 1: lr" in line for line in wrong)
    assert any("loss" in line for line in wrong)
    assert any("first: layers." in line for line in wrong)
