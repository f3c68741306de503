"""Comparisons read back and reported, from made-up folders with hand-made numbers."""

import json
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

from raptr_ds.errors import DataError
from raptr_ds.lab.comparison import load_comparison, mean_curve
from raptr_ds.lab.report import write_report

# Final held-out losses by contestant and seed; of the full model.
LOSSES = {"standard": {1: 3.0, 2: 3.2, 3: 3.4}, "raptr": {1: 2.9, 2: 3.0, 3: 3.1}}
PHASED = {"standard": [4, 4, 4, 4], "raptr": [2, 2, 4, 4]}


def training_line(step, length, seed):
    path = list(range(length))
    line = {"step": step, "loss": 5.0 - 0.1 * step + seed, "path": path, "path_length": length, "phase": length // 4}
    return {**line, "flops": 100 * length * step, "tokens": step, "step_seconds": 0.5 * length}


def run_record(purpose, name, seed, folder, rate=None):
    command = f"python raptr_ds/pretrain.py --set a=<b> seed={seed}"
    record = {"purpose": purpose, "contestant": name, "seed": seed, "learning_rate": rate, "steps": 4}
    return {**record, "folder": folder, "command": command}


def write_run(folder, name, seed, final, steps=4):
    folder.mkdir(parents=True)
    lines = [training_line(step, PHASED[name][step - 1], seed) for step in range(1, steps + 1)]
    lines.insert(2, {"step": 2, "eval_loss": final + 1.0, "path_length": 4})
    if steps == 4:
        lines.append({"step": 4, "eval_loss": final, "path_length": 4})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "outcome.json").write_text(json.dumps({"exit_code": 0, "wall_seconds": 10.0, "starts": 1}))


@pytest.fixture
def folder(tmp_path):
    runs = []
    for name, losses in LOSSES.items():
        for seed, loss in losses.items():
            write_run(tmp_path / name / str(seed), name, seed, loss)
            runs.append(run_record("comparison", name, seed, f"{name}/{seed}"))
    contestant = {"settings": ["a=1"], "num_layers": 4, "steps": 4, "flops": 1600.0, "seconds": None}
    record = {
        "name": "mine & yours",
        "base": "base.json",
        "settings": [],
        "processes": 1,
        "seeds": [1, 2, 3],
        "budget": "equal steps",
        "sweep": None,
        "contestants": [{"name": name, "path": name, "learning_rate": None, **contestant} for name in LOSSES],
        "runs": runs,
        "sessions": [
            {"command": "python tools/experiment.py F", "started": "t", "versions": {"x": "1"}, "machine": "m"}
        ],
    }
    (tmp_path / "experiment.json").write_text(json.dumps(record))
    return tmp_path


@pytest.fixture
def tables_alone(monkeypatch):
    """Reports without pictures, which take a second each."""
    for name in ("loss", "phases", "paths", "rates"):
        monkeypatch.setattr(f"raptr_ds.lab.report.{name}_picture", lambda comparison: None)


def change(folder, **values):
    record = json.loads((folder / "experiment.json").read_text())
    (folder / "experiment.json").write_text(json.dumps({**record, **values}))


def rows_of(folder, title):
    """Return the cells of the rows of the first table of a section of report.md."""
    text = (folder / "report.md").read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


@pytest.mark.usefixtures("tables_alone")
def test_the_table_holds_means_spread_and_paired_differences(folder):
    write_report(load_comparison(folder))
    standard, raptr = rows_of(folder, "Results")
    assert standard[4:] == ["3", "3.2000", "0.2000", "3.0000 to 3.4000", "-", "-"]
    # Differences -0.1, -0.2, -0.3: mean -0.2, deviation 0.1, t(0.975, 2) = 4.3027.
    half = 4.302653 * 0.1 / np.sqrt(3)
    assert raptr[4:8] == ["3", "3.0000", "0.1000", "2.9000 to 3.1000"]
    assert raptr[8:] == [f"-0.2000 ± {half:.4f} (n=3)", "3 of 3"]


@pytest.mark.usefixtures("tables_alone")
def test_cost_is_of_what_ran(folder):
    write_report(load_comparison(folder))
    standard, raptr = rows_of(folder, "Cost")
    assert standard[1:] == ["4", "1600", "1600", "1.000", "2", "8.0", "1.000", "10.0"]
    assert raptr[1:] == ["4", "1600", "1600", "1.000", "1.5", "6.0", "0.750", "10.0"]


@pytest.mark.usefixtures("tables_alone")
def test_cost_is_compared_on_the_seeds_that_both_have(folder):
    """Seed 1 of standard took four times as long; raptr has not run on it."""
    for seed in (1, 2, 3):
        file = folder / "standard" / str(seed) / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        slower = [{**line, "step_seconds": 8.0} if seed == 1 and "loss" in line else line for line in lines]
        file.write_text("".join(json.dumps(line) + "\n" for line in slower))
    shutil.rmtree(folder / "raptr" / "1")
    write_report(load_comparison(folder))
    standard, raptr = rows_of(folder, "Cost")
    assert standard[5:8] == ["4", "16.0", "1.000"]
    assert raptr[5:8] == ["1.5", "6.0", "0.750"]


@pytest.mark.usefixtures("tables_alone")
def test_unfinished_and_failed_runs_are_reported_and_left_out(folder):
    (folder / "raptr" / "2" / "metrics.jsonl").unlink()
    (folder / "raptr" / "2" / "outcome.json").write_text(json.dumps({"exit_code": 9, "wall_seconds": 1.0}))
    (folder / "raptr" / "2" / "log.txt").write_text("first\nMemoryError: no room\n")
    (folder / "raptr" / "3" / "metrics.jsonl").write_text(json.dumps(training_line(1, 2, 3)) + "\n")
    (folder / "raptr" / "3" / "outcome.json").write_text(json.dumps({"exit_code": 75, "wall_seconds": 1.0}))
    comparison = load_comparison(folder)
    write_report(comparison)
    raptr = rows_of(folder, "Results")[1]
    assert raptr[4:] == ["1", "2.9000", "-", "2.9000 to 2.9000", "-0.1000 (n=1)", "1 of 1"]
    text = (folder / "report.md").read_text()
    assert "4 of 6 runs are finished" in text
    assert "exit code 9" in text
    assert "MemoryError: no room" in text
    assert text.count("FAILED") == 1  # not the one that was asked to stop
    assert [run.state for run in comparison.of("raptr")][2] == "unfinished, at step 1 of 4"


def test_a_loss_that_is_not_finite_is_no_result(folder):
    write = folder / "raptr" / "1" / "metrics.jsonl"
    write.write_text(write.read_text().replace('"eval_loss": 2.9', '"eval_loss": null'))
    comparison = load_comparison(folder)
    assert comparison.final_losses("raptr") == {2: 3.0, 3: 3.1}
    write_report(comparison)


def test_mean_curves_against_steps_flops_and_seconds(folder):
    runs = load_comparison(folder).of("raptr")
    x, losses = mean_curve(runs, "seconds", evaluated=True)
    assert x.tolist() == [2.0, 6.0]
    np.testing.assert_allclose(losses.mean(axis=0), [4.0, 3.0])
    assert mean_curve(runs, "flops", evaluated=False)[0].tolist() == [200, 400, 1200, 1600]
    assert mean_curve(runs, "step", evaluated=False)[1].shape == (3, 4)


@pytest.mark.usefixtures("tables_alone")
def test_the_full_model_through_the_phases(folder):
    comparison = load_comparison(folder)
    assert comparison.of("raptr")[0].phase_losses() == [(1.0, 2.0, pytest.approx(3.9)), (3.0, 4.0, pytest.approx(2.9))]
    write_report(comparison)
    assert rows_of(folder, "The full model's loss by phase") == [
        ["raptr", "0", "1", "2", "4.0000", "3"],
        ["raptr", "1", "3", "4", "3.0000", "3"],
    ]


def test_rates_are_reported_and_an_edge_is_noted(folder):
    runs = json.loads((folder / "experiment.json").read_text())["runs"]
    for number, rate in enumerate((1e-3, 2e-3, 4e-3)):
        for name in LOSSES:
            write_run(folder / "tuning" / name / str(rate), name, 9, 3.0 - 0.1 * number)
            runs.append(run_record("tuning", name, 9, f"tuning/{name}/{rate}", rate))
    contestants = json.loads((folder / "experiment.json").read_text())["contestants"]
    contestants = [{**one, "learning_rate": 4e-3} for one in contestants]
    change(folder, runs=runs, contestants=contestants, sweep={"learning_rates": [1e-3, 2e-3, 4e-3], "seed": 9})
    write_report(load_comparison(folder))
    assert rows_of(folder, "Learning rates")[0] == ["standard", "3.0000", "2.9000", "2.8000", "0.004"]
    assert "raptr did best at the highest learning rate tried" in (folder / "report.md").read_text()
    assert (folder / "report" / "rates.png").exists()


class References(HTMLParser):
    """Collects what a page refers to, its tags, and its visible text."""

    def __init__(self):
        super().__init__()
        self.references, self.tags, self.text = [], set(), ""

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.references += [value for key, value in attrs if key in {"src", "href", "srcset", "data", "action"}]

    def handle_data(self, data):
        self.text += data


def test_the_page_needs_nothing_else(folder):
    _, page = write_report(load_comparison(folder))
    text = page.read_text()
    found = References()
    found.feed(text)
    assert len(found.references) == 3
    assert all(reference.startswith("data:image/png;base64,iVBOR") for reference in found.references)
    assert not found.tags & {"script", "link", "iframe", "object", "b"}
    without_pictures = text
    for reference in found.references:
        without_pictures = without_pictures.replace(reference, "")
    assert not any(word in without_pictures for word in ("http:", "https:", "url(", "@import", "//"))
    assert "mine & yours" in found.text
    assert "--set a=<b>" in found.text
    for picture in ("loss", "phases", "paths"):
        assert f"(report/{picture}.png)" in (folder / "report.md").read_text()
        assert (folder / "report" / f"{picture}.png").exists()


def test_a_comparison_before_its_first_step_has_a_report_too(folder):
    change(folder, runs=[])
    markdown, _ = write_report(load_comparison(folder))
    assert "0 of 6 runs are finished" in markdown.read_text()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3", '{"runs": 1}', '{"runs": [], "contestants": [1]}', "\x00"])
def test_a_damaged_record_is_a_users_error(folder, text):
    (folder / "experiment.json").write_text(text)
    with pytest.raises(DataError, match=r"experiment\.json is damaged \(\w+: .*\)\. Remove it"):
        load_comparison(folder)


@pytest.mark.parametrize("key", ["seeds", "contestants", "sessions"])
def test_a_record_without_a_key_is_a_users_error(folder, key):
    record = json.loads((folder / "experiment.json").read_text())
    del record[key]
    (folder / "experiment.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match=f"is damaged .*{key}"):
        load_comparison(folder)


@pytest.mark.parametrize("text", ["", '{"exit_code": 0', "[]", '{"code": 0}'])
def test_a_damaged_outcome_is_a_users_error(folder, text):
    (folder / "raptr" / "1" / "outcome.json").write_text(text)
    with pytest.raises(DataError, match=r"outcome\.json is damaged \(.*\)\. Restore it, or remove it"):
        load_comparison(folder)


def test_a_folder_without_a_comparison_is_a_users_error(tmp_path):
    with pytest.raises(DataError, match=r"experiment\.json"):
        load_comparison(tmp_path)
