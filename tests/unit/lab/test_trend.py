"""Several comparisons side by side: made-up runs whose differences are known, and what cannot be shown."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread

from raptr_ds.errors import DataError
from raptr_ds.lab.comparison import load_comparison
from raptr_ds.lab.plots import trend_picture
from raptr_ds.lab.trend import trend
from tests.unit.lab.conftest import HANDICAPS, Lab

TOOL = Path(__file__).parents[3] / "tools" / "trend.py"


def run(lab: Lab, name: str, **changes) -> Path:
    planner = lab.planner(output=str(lab.folder / name), **changes)
    lab.run(planner)
    return planner.output


def at_equal_steps(lab: Lab, name: str, steps: int, **changes) -> Path:
    return run(lab, name, budget={"equal": "steps", "steps": steps}, **changes)


def test_shorter_training_comes_first_and_every_setting_stands_alone(lab):
    folders = [at_equal_steps(lab, "long", 60), at_equal_steps(lab, "short", 20)]
    folders.append(run(lab, "flops", budget={"equal": "flops", "steps": 40, "of": "standard"}))
    points = trend(load_comparison(folder) for folder in folders)
    model = "bert, 6 layers of width 32"
    assert [(point.setting, point.contestant, point.against, point.tokens) for point in points] == [
        (f"{model}, equal executed FLOPs", "raptr", "standard", 128 * 40),
        (f"{model}, equal steps", "raptr", "standard", 128 * 20),
        (f"{model}, equal steps", "raptr", "standard", 128 * 60),
    ]
    assert [point.difference.n for point in points] == [3, 3, 3]
    for point in points[1:]:  # as many steps: what the stand-in adds to the method's loss
        assert point.difference.mean == pytest.approx(HANDICAPS["raptr"])
        assert point.difference.half_width == pytest.approx(0.0, abs=1e-9)
    # More steps for the same FLOPs; the stand-in's loss is 5 step^-0.1.
    steps = load_comparison(folders[2]).about("raptr")["steps"]
    assert steps > 40
    assert points[0].difference.mean == pytest.approx(HANDICAPS["raptr"] + 5 * (steps**-0.1 - 40**-0.1))


def test_contestants_without_a_finished_run_are_left_out_and_nothing_at_all_is_refused(lab):
    third = {"name": "late", "method": "constant", "set": []}
    lab.stand_in.stopping = {f"late, seed {seed}" for seed in (1, 2, 3)}
    folder = at_equal_steps(lab, "some", 20, contestants=[*_contestants(lab), third])
    assert {point.contestant for point in trend([load_comparison(folder)])} == {"raptr"}
    for config in folder.rglob("metrics.jsonl"):
        config.unlink()
    with pytest.raises(DataError, match="no contestant has finished a seed that the first"):
        trend([load_comparison(folder)])


def test_comparisons_that_begin_with_others_do_not_stand_side_by_side(lab):
    folders = [at_equal_steps(lab, "one", 20), at_equal_steps(lab, "two", 20, contestants=_contestants(lab)[::-1])]
    with pytest.raises(DataError, match=r"different contestants, standard in .*one, raptr in .*two: differences"):
        trend(load_comparison(folder) for folder in folders)


def test_named_contestants_are_shown_alone_and_unknown_ones_refused(lab):
    third = {"name": "constant", "method": "constant", "set": []}
    folders = [
        at_equal_steps(lab, "long", 60),
        at_equal_steps(lab, "short", 20, contestants=[*_contestants(lab), third]),
    ]
    comparisons = [load_comparison(folder) for folder in folders]
    assert [point.contestant for point in trend(comparisons)] == ["raptr", "raptr", "constant"]
    assert trend(comparisons, ["raptr"]) == [point for point in trend(comparisons) if point.contestant == "raptr"]
    with pytest.raises(DataError, match=r"no comparison has standard, half beside .*Name some of raptr, constant\."):
        trend(comparisons, ["standard", "raptr", "half"])


def test_a_model_that_cannot_be_read_is_named(lab):
    folder = at_equal_steps(lab, "some", 20)
    file = folder / "runs" / "standard" / "seed-1" / "config.json"
    file.write_text('{"raptr_ds": {"model": {"num_layers": 6}}}')
    with pytest.raises(DataError, match=r"seed-1/config\.json: raptr_ds\.model cannot be read \(KeyError: 'arch"):
        trend([load_comparison(folder)])
    file.unlink()
    with pytest.raises(DataError, match="FileNotFoundError"):
        trend([load_comparison(folder)])


def test_the_tool_prints_a_table_and_draws(lab):
    folders = [at_equal_steps(lab, "long", 60), at_equal_steps(lab, "short", 20)]
    shutil.rmtree(folders[1] / "runs" / "raptr" / "seed-3")  # two pairs left
    picture = lab.folder / "new" / "trend.png"
    done = subprocess.run(
        [sys.executable, str(TOOL), *map(str, folders), "--output", str(picture)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line[:1] == "|"]
    assert rows[0] == ["setting", "tokens", "contestant", "n", "against standard", "seeds below"]
    assert [row[1:4] for row in rows[2:]] == [["2,560", "raptr", "2"], ["7,680", "raptr", "3"]]
    assert all(row[4].startswith("+0.0500 ± 0.0000") and row[5][0] == "0" for row in rows[2:])
    height, width = imread(picture).shape[:2]
    assert width > height > 300


@pytest.mark.parametrize(("count", "least"), [(1, 1.0), (2, 0.98), (14, 0.9)])
def test_points_at_the_same_tokens_stay_close_whatever_their_number(lab, monkeypatch, count, least):
    """A neighbour at twice the tokens is nowhere near: all of one place are around it, within a tenth of it."""
    (point,) = trend([load_comparison(at_equal_steps(lab, "one", 20))])
    points = [replace(point, contestant=f"c{number}", tokens=1e6) for number in range(count)]
    drawn = []
    monkeypatch.setattr(Axes, "errorbar", lambda axes, places, *_, **__: drawn.append(places[0]))
    trend_picture(points)
    assert len(set(drawn)) == count
    assert (min(drawn), max(drawn)) == (pytest.approx(least), pytest.approx(2 - least))


def test_a_folder_without_a_comparison_is_a_users_mistake(tmp_path):
    command = [sys.executable, str(TOOL), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no comparison has run there" in done.stderr


def _contestants(lab: Lab) -> list[dict]:
    lab.planner()
    return json.loads(lab.file.read_text())["contestants"]
