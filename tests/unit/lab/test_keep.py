"""The small copy of a comparison: the same report from it, exact sums, and what the law reads of it."""

import filecmp
import importlib
import os
import platform
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from raptr_ds.errors import ConfigError, DataError
from raptr_ds.lab.comparison import RECORD, load_comparison, write_record
from raptr_ds.lab.keep import keep
from raptr_ds.lab.report import write_report
from raptr_ds.lab.slurm import write_jobs
from raptr_ds.planner.results import read_results
from raptr_ds.runtime.metrics_file import read_metrics

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture
def tables_alone(monkeypatch):
    """Reports without pictures, which take a second each."""
    for name in ("loss", "phases", "paths", "rates"):
        monkeypatch.setattr(f"raptr_ds.lab.report.{name}_picture", lambda comparison: None)


@pytest.mark.usefixtures("tables_alone")
def test_the_report_of_the_copy_is_that_of_the_comparison_but_for_the_machines_name(lab, tmp_path):
    planner = lab.planner(sweep={"learning_rates": [1e-3, 2e-3], "seed": 99})
    lab.run(planner)
    comparison = load_comparison(planner.output)
    copy = keep(comparison, tmp_path / "kept", lines=5)
    name, _, kind = comparison.record["sessions"][0]["machine"].partition(", ")
    assert name
    whole, small = (write_report(load_comparison(folder))[0].read_text() for folder in (planner.output, copy))
    assert small == whole.replace(f"{name}, {kind}", kind)
    assert "standard" in small
    assert sum(file.stat().st_size for file in copy.rglob("*.json*")) < 50_000


def test_thinned_curves_keep_sums_phases_means_and_evaluations(lab, tmp_path):
    planner = lab.planner()
    lab.run(planner)
    comparison = load_comparison(planner.output)
    copy = load_comparison(keep(comparison, tmp_path / "kept", lines=10))
    for run, small in zip(comparison.runs, copy.runs, strict=True):
        assert run.curves is not None
        assert small.curves is not None
        places = np.searchsorted(run.curves.step, small.curves.step)
        assert len(places) < 0.5 * len(run.curves.step)
        np.testing.assert_array_equal(run.curves.step[places], small.curves.step)
        np.testing.assert_allclose(small.curves.seconds, run.curves.seconds[places])
        np.testing.assert_array_equal(small.curves.flops, run.curves.flops[places])
        np.testing.assert_array_equal(small.curves.eval_loss, run.curves.eval_loss)
        assert small.curves.phase_starts() == run.curves.phase_starts()
        assert small.final_loss == run.final_loss
        windows = np.split(run.curves.loss, places[:-1] + 1)
        np.testing.assert_allclose(small.curves.loss, [window.mean() for window in windows])


def test_a_tuning_run_that_is_compared_too_is_kept_once(lab, tmp_path):
    planner = lab.planner(sweep={"learning_rates": [1e-3, 2e-3], "seed": 1})
    lab.run(planner)
    copy = load_comparison(keep(load_comparison(planner.output), tmp_path / "kept"))
    assert len(copy.tuning) == 4
    assert len(copy.runs) == 6
    assert all(run.is_finished for run in (*copy.tuning, *copy.runs))


def test_the_law_reads_it(lab, tmp_path):
    """Standard training and RaPTr by its schedule, not RaPTr with another option."""
    contestants = [
        {"name": "standard", "method": "standard"},
        {"name": "raptr", "method": "raptr", "set": ["raptr_ds.path.schedule=3-4-5-6"]},
        {"name": "scaled", "method": "raptr", "set": ["raptr_ds.path.residual_scale=sqrt"]},
    ]
    planner = lab.planner(contestants=contestants)
    lab.run(planner)
    folder = keep(load_comparison(planner.output), tmp_path / "kept")
    standard, raptr = read_results("bert", folder.parent)
    assert not read_results("ul2", folder.parent)
    # A layer of width 32: four projections and an MLP of 32 x 128, with biases, and two norms.
    layer = 4 * (32 * 32 + 32) + 2 * 32 * 128 + 128 + 32 + 2 * 2 * 32
    assert standard.model == raptr.model == "6 layers x 32, constant rate, nowhere"
    assert standard.tokens == raptr.tokens == 128 * 40 / (6 * layer)
    files = {name: folder / f"runs/{name}/seed-1/metrics.jsonl" for name in ("standard", "raptr")}
    lines = {name: read_metrics(file).training[40] for name, file in files.items()}
    assert standard.saving == 0
    assert raptr.saving == pytest.approx(1 - lines["raptr"]["flops"] / lines["standard"]["flops"])
    losses = [read_metrics(folder / f"runs/raptr/seed-{seed}/metrics.jsonl").evaluations[40, 6] for seed in (1, 2, 3)]
    assert raptr.loss == pytest.approx(np.mean(losses))


def test_a_copy_put_back_is_finished_and_takes_more_seeds(lab, tmp_path):
    first = lab.planner(seeds=[1])
    lab.run(first)
    kept = keep(load_comparison(first.output), tmp_path / "kept")
    shutil.rmtree(first.output)
    shutil.copytree(kept, first.output)
    lab.run(lab.planner(seeds=[1, 2]))
    assert lab.stand_in.started == ["standard, seed 2", "raptr, seed 2"]
    again = keep(load_comparison(first.output), tmp_path / "again")
    machines = [session["machine"] for session in load_comparison(again).record["sessions"]]
    assert machines[0] == f"{platform.machine()}, {os.cpu_count()} CPU threads"
    assert set(machines) == {machines[0]}
    for run in ("standard/seed-1", "raptr/seed-1"):  # thinned once
        assert filecmp.cmp(kept / "runs" / run / "metrics.jsonl", again / "runs" / run / "metrics.jsonl", shallow=False)
    losses = [run.final_loss for run in load_comparison(first.output).runs]
    assert losses == pytest.approx([losses[0] + more for more in (0, 0.05, 0.01, 0.06)])


def test_runs_that_the_record_does_not_have_yet_are_missed(lab, tmp_path):
    planner = lab.planner(sweep={"learning_rates": [1e-3, 2e-3], "seed": 9})
    write_record(
        planner, write_jobs(planner, lab.file, [])[0], "mine", None
    )  # as --slurm does, before any rate is known
    record = (planner.output / RECORD).read_text()
    lab.run(planner)
    (planner.output / RECORD).write_text(record)
    with pytest.raises(DataError, match=r"experiment\.json has 0 of 6 compared runs.*FILE --report"):
        keep(load_comparison(planner.output), tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_what_is_not_finished_or_there_already_is_refused(lab, tmp_path):
    planner = lab.planner()
    lab.run(planner)
    keep(load_comparison(planner.output), tmp_path / "kept")
    with pytest.raises(DataError, match="Remove it to keep the comparison again"):
        keep(load_comparison(planner.output), tmp_path / "kept")
    last = planner.output / "runs/raptr/seed-3/metrics.jsonl"
    last.write_text("\n".join(last.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(DataError, match="raptr/seed-3 is unfinished, at step 40 of 40: only finished"):
        keep(load_comparison(planner.output), tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["FILE", "--write-only"], "--write-only goes with --slurm: without it the runs would start here"),
        (["FOLDER", "--report", "--set", "seeds=[1]"], "out is a folder, which is reported as its record is"),
    ],
)
def test_options_that_would_do_nothing_are_refused(lab, monkeypatch, arguments, message):
    planner = lab.planner()
    monkeypatch.syspath_prepend(REPOSITORY / "tools")
    planner.output.mkdir()
    named = {"FILE": str(lab.file), "FOLDER": str(planner.output)}
    monkeypatch.setattr(sys, "argv", ["experiment.py", *(named.get(word, word) for word in arguments)])
    with pytest.raises(ConfigError, match=message):
        importlib.import_module("experiment").main()
    assert not list(planner.output.iterdir())


@pytest.mark.usefixtures("tables_alone")
def test_the_command_line_keeps_and_reports(lab, tmp_path, monkeypatch, capsys):
    planner = lab.planner()
    lab.run(planner)
    monkeypatch.syspath_prepend(REPOSITORY / "tools")
    main, kept = importlib.import_module("experiment").main, tmp_path / "kept"
    monkeypatch.setattr(sys, "argv", ["experiment.py", str(lab.file), "--keep", str(kept)])
    main()
    monkeypatch.setattr(sys, "argv", ["experiment.py", str(kept / "mine"), "--report"])
    main()
    printed = capsys.readouterr().out
    assert f"kept in {kept / 'mine'}\n" in printed
    assert "| raptr | raptr 3-4-5-6 freeze | 40 |" in printed
    assert (kept / "mine" / "report.html").exists()
