"""Some of the cases that `make soak-layouts` draws, and that it would notice a layout that trains something else."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.soak.layouts import Case

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("seed", ["B", "H", "S"])
def test_a_drawn_run_comes_to_the_same_in_drawn_layouts(data_folder: Path, tmp_path: Path, seed: str) -> None:
    case = Case(seed, tmp_path, data_folder)
    assert case.differences() == [], case


def test_a_layout_that_trains_something_else_is_noticed(data_folder: Path, tmp_path: Path) -> None:
    case = Case("A", tmp_path, data_folder)
    rate = {"optimizer.params": {**case.run["optimizer.params"], "lr": 0.9}}
    first = case.layouts[0]
    case.layouts[0] = replace(first, keys=first.keys | rate)
    case.handover = None
    wrong = case.differences()
    assert any("first, step 1: lr" in line for line in wrong)
    assert any("loss" in line for line in wrong)
