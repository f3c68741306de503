"""The picture of a run, written from synthetic metrics by the command line."""

import json
import os
import re
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib import rc_context
from matplotlib.cbook import is_math_text
from matplotlib.figure import Figure

from raptr_ds.errors import ConfigError
from raptr_ds.plots.curves import load_curves
from raptr_ds.plots.pictures import check_picture, looks_of
from raptr_ds.plots.runs import draw_loss, plot_runs
from tests.path_methods import path_method

TOOL = Path(__file__).parents[3] / "tools" / "plot_run.py"


def write_run(folder, num_steps, num_layers=12, **path):
    """Write metrics of a made-up run: a falling, noisy loss, and the paths of a real method."""
    folder.mkdir()
    method = path_method(num_layers=num_layers, num_steps=num_steps, seed=1, **path)
    noise, flops = np.random.default_rng(0), 0
    with (folder / "metrics.jsonl").open("w") as stream:
        for step in range(1, num_steps + 1):
            drawn = method.path_at(step - 1)
            flops += 10**9 * drawn.length
            decay = 4.5 * (step / num_steps + 0.02) ** -0.15
            line = {"step": step, "loss": decay + 0.05 * (num_layers - drawn.length) + 0.15 * noise.standard_normal()}
            line |= {"path": drawn.layers, "path_length": drawn.length, "phase": drawn.phase, "flops": flops}
            stream.write(json.dumps(line) + "\n")
            if step % max(1, num_steps // 10) == 0:
                stream.write(json.dumps({"step": step, "eval_loss": decay, "path_length": num_layers}) + "\n")
    return folder


def plot(*arguments):
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def png_size(file):
    header = file.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


@pytest.mark.parametrize("num_steps", [1, 1500])
def test_a_run_becomes_a_picture_in_its_folder(tmp_path, num_steps):
    folder = write_run(tmp_path / "raptr", num_steps, method="raptr", schedule="6-8-10-12")
    result = plot(folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"wrote {folder / 'plot.png'}\n"
    width, height = png_size(folder / "plot.png")
    assert (width, height) == (1680, round((5.6 + 3.0) * 120))


def test_scores_on_tasks_have_a_panel_for_each_metric(tmp_path):
    run = write_run(tmp_path / "run", 60, method="full")
    scores = {"boolq": {"acc": 0.5, "acc_stderr": 0.02, "bits": 3.0}, "copa": {"acc": 0.6, "f1": 0.2}}
    with (run / "metrics.jsonl").open("a") as stream:
        stream.writelines(json.dumps({"step": step, "tasks": scores}) + "\n" for step in (20, 40))
    result = plot(run)
    assert result.returncode == 0, result.stderr
    assert png_size(run / "plot.png") == (1680, round((5.6 + 3.0 + 2 * 4.0) * 120))  # three metrics, two in a row


def test_several_runs_become_one_picture(tmp_path):
    raptr = write_run(tmp_path / "raptr", 120, method="raptr", schedule="6-8-10-12", sampling="bernoulli")
    full = write_run(tmp_path / "full", 120, method="full")
    result = plot(raptr, full, "--output", tmp_path / "pictures" / "both.png")
    assert result.returncode == 0, result.stderr
    assert png_size(tmp_path / "pictures" / "both.png")[1] == round((5.6 + 6.0) * 120)
    assert result.stderr == ""


def test_runs_whose_losses_do_not_compare_are_drawn_with_a_warning(tmp_path):
    runs = [write_run(tmp_path / name, 5, method="full") for name in ("bert", "ul2")]
    for run in runs:
        model = {"architecture": run.name, "num_layers": 12, "vocab_size": 1024}
        (run / "config.json").write_text(json.dumps({"raptr_ds": {"model": model}}))
    result = plot(*runs)
    assert result.returncode == 0, result.stderr
    assert result.stderr == (
        "warning: these runs have different objectives (bert, ul2): their losses cannot be compared\n"
    )


@pytest.mark.parametrize("name", ["half.txt", "half", "half.npy", ".png"])
def test_a_file_that_is_no_picture_is_refused_before_any_work(tmp_path, name):
    result = plot(tmp_path / "nothing", "--output", tmp_path / name)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: --output {tmp_path / name}: a picture's file ends in")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tool", ["trend.py", "depth.py", "theory.py"])
def test_so_does_every_tool_that_draws(tmp_path, tool):
    words = ["polynomials", "--plot"] if tool == "theory.py" else [tmp_path, "--output"]
    command = [sys.executable, str(TOOL.with_name(tool)), *map(str, words), str(tmp_path / "p.txt")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert "p.txt: a picture's file ends in" in result.stderr


def test_every_format_that_is_offered_can_be_written(tmp_path):
    run = load_curves(write_run(tmp_path / "run", 3, method="full"))
    with pytest.raises(ConfigError) as refused:
        check_picture(tmp_path / "x", "--output")
    formats = re.findall(r" \.(\w+)", str(refused.value).partition("ends in")[2].partition(". Write")[0])
    assert {"png", "pdf", "svg"} < set(formats)
    for ending in formats:
        check_picture(tmp_path / f"x.{ending.upper()}", "--output")
        plot_runs([run], tmp_path / f"x.{ending}")
    with pytest.raises(ConfigError, match=r"ends in \.png\. Write .*x\.png"):
        check_picture(tmp_path / "x.pdf", "--output", ("png",))


@pytest.mark.parametrize("name", ["_try", "a$b$", r"$\no$", "50%"])
def test_a_folders_name_is_shown_as_it_is(tmp_path, name):
    runs = [load_curves(write_run(tmp_path / name, 3, method="full"))]
    plot_runs(runs, tmp_path / "picture.png")
    axes = Figure().add_subplot()
    draw_loss(axes, runs[0], runs[0].step, "#000000")
    _, labels = axes.get_legend_handles_labels()
    shown = [label.replace(r"\$", "$").strip() for label in labels]
    assert shown == [f"{name}, training", f"{name}, full model, held out"]
    assert not any(map(is_math_text, labels))
    plot_runs([replace(runs[0], name=os.fsdecode(b"\xff"))], tmp_path / "picture.png")


def test_no_two_of_many_names_look_the_same():
    names = [str(number) for number in range(48)]
    looks = looks_of(names)
    assert len(set(looks.values())) == 48
    assert len({look.colour for look in list(looks.values())[:12]}) == 12
    assert {look.line for look in list(looks.values())[:12]} == {"-"}


def test_a_folder_without_metrics_is_one_message_and_exit_code_2(tmp_path):
    result = plot(tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: cannot read")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("name", ["_mine", "a$b$c", "$_{", r"$\x$"])
def test_names_are_drawn_as_they_are(tmp_path, name):
    run = load_curves(write_run(tmp_path / name, 10, method="full"))
    with rc_context({"svg.fonttype": "none"}):  # texts as texts
        plot_runs([run], tmp_path / "a.svg")
    drawn = re.sub(r"<[^>]*>", "", (tmp_path / "a.svg").read_text(encoding="utf-8"))
    assert all(f"{name}{what}" in drawn for what in (", training", ", full model, held out", ": active layers"))
