"""Advice and the planning tool: a wasteful layout gets advice, a good one none, and mistakes end with a message."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import hjson
import pytest

from raptr_ds.config.load import load_run_config
from raptr_ds.planner.advice import advice
from raptr_ds.planner.plan import plan_run
from raptr_ds.planner.setting import setting_of
from raptr_ds.planner.step_time import Device
from raptr_ds.runtime.method import path_method_of

REPOSITORY = Path(__file__).parents[3]
RUN_FILE = REPOSITORY / "deepspeed_configs" / "ul2_1b_raptr.json"
VOCAB, PIPELINE = "raptr_ds.model.vocab_size=32000", "raptr_ds.parallel.pipeline_model_parallel_size"
NOT_PREPARED = "raptr_ds.data.path=no/such/folder"


def advised(*overrides, processes=4):
    return advice(load_run_config(RUN_FILE, [VOCAB, *overrides], processes), Device())


def test_uniform_paths_on_a_pipeline_get_advice_what_balanced_ones_would_take():
    lines = advised(f"{PIPELINE}=4")
    assert any("sampling=uniform on 4 pipeline stages" in line and "sampling=balanced" in line for line in lines)
    assert any(f"{PIPELINE}=1 instead of 4" in line for line in lines)


def test_balanced_paths_of_lengths_that_divide_need_no_advice_on_paths():
    lines = advised(f"{PIPELINE}=4", "raptr_ds.path.sampling=balanced")
    assert not any("sampling" in line or "does not divide" in line for line in lines)
    uneven = advised(f"{PIPELINE}=4", "raptr_ds.path.sampling=balanced", "raptr_ds.path.schedule=13-18-24")
    assert any("13 does not divide by 4 stages. 12 or 16" in line for line in uneven)


def test_without_a_pipeline_nothing_is_wasted():
    assert advised() == []


def plan(monkeypatch, capsys, *arguments):
    """Run tools/plan.py in this process and return its exit code, output and errors."""
    monkeypatch.setattr(sys, "argv", ["plan.py", str(RUN_FILE), *arguments])
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    code = 0
    try:
        runpy.run_path(str(REPOSITORY / "tools" / "plan.py"), run_name="__main__")
    except SystemExit as stop:
        code = int(stop.code or 0)
    output = capsys.readouterr()
    return code, output.out, output.err


def test_the_tool_plans(monkeypatch, capsys):
    code, out, _ = plan(
        monkeypatch, capsys, "--processes", "8", "--tflops", "100", "--set", f"{PIPELINE}=4", NOT_PREPARED
    )
    assert code == 0
    for fragment in ("1,602.7M parameters", "32,000 assumed", "pipeline 4", "100 effective", "**Warning.**", "GiB"):
        assert fragment in out


def test_the_tool_proposes_a_schedule(monkeypatch, capsys):
    code, out, _ = plan(monkeypatch, capsys, "--processes", "8", "--save", "20%", "--set", NOT_PREPARED)
    assert code == 0
    assert "proposed: raptr_ds.path.schedule=" in out
    assert any(
        f"{saved:.1f}% less" in out for saved in (19.5, 19.6, 19.7, 19.8, 19.9, 20.0, 20.1, 20.2, 20.3, 20.4, 20.5)
    )


def test_a_proposed_path_has_room_for_the_runs_own_fixed_layers(monkeypatch, capsys):
    fixed = f"raptr_ds.path.fixed_layers={[*range(18)]}"
    code, out, err = plan(monkeypatch, capsys, "--processes", "8", "--save", "10%", "--set", NOT_PREPARED, fixed)
    assert code == 0, err
    schedule = out.partition("proposed: raptr_ds.path.schedule=")[2].split()[0]
    assert min(map(int, schedule.split("-"))) >= 18


def test_the_tool_chooses_a_schedule_by_the_law(monkeypatch, capsys):
    best = ("--processes", "8", "--save", "best", "--set", NOT_PREPARED)
    code, out, _ = plan(monkeypatch, capsys, *best, "--tokens", "1e9")
    assert code == 0
    assert "proposed: raptr_ds.path.schedule=half" in out
    assert "- paths: raptr 4-6-14-24" in out
    assert "a standard run of 1e+09 tokens sees 0.654 for each" in out
    assert "extrapolated" not in out
    code, out, _ = plan(monkeypatch, capsys, *best)  # the tokens of the run file
    assert code == 0
    assert "**extrapolated**: the longest standard run measured saw 10.9 tokens" in out
    assert "proposed: raptr_ds.path.schedule=paper" in out


@pytest.mark.parametrize(("gib", "fits"), [("10", False), ("90", True)])
def test_the_tool_warns_of_a_device_that_is_too_small(monkeypatch, capsys, gib, fits):
    code, out, _ = plan(monkeypatch, capsys, "--device-memory", gib, "--set", NOT_PREPARED)
    assert code == 0
    assert f"- {gib} GiB hold" in out
    assert ("**Warning.** By the plan the fullest rank needs" not in out) is fits
    assert ("activation_checkpointing=true (a third more work)" not in out) is fits


def test_the_tool_prints_the_micro_batches_for_the_run_file(monkeypatch, capsys):
    """The line, written into the run file as it stands, gives a run whose phases hold no more than its last."""
    settings = [NOT_PREPARED, "raptr_ds.path.schedule=3-6-12-24", "raptr_ds.path.full_warmup_steps=100"]
    settings += ["raptr_ds.parallel.micro_batches=[8]"]  # for another schedule: no hindrance to a new line
    code, line, _ = plan(monkeypatch, capsys, "--processes", "2", "--micro-batches", "--set", *settings)
    assert code == 0
    sizes = hjson.loads(line)["micro_batches"]
    assert sizes == [32, 16, 8, 8]
    config = load_run_config(RUN_FILE, [VOCAB, *settings[:-1], f"raptr_ds.parallel.micro_batches={sizes}"], 2)
    phases = plan_run(path_method_of(config), setting_of(config, Device())).phases
    assert [phase.layout.micro_batch for phase in phases] == [8, *sizes]
    assert max(phase.memory.activations for phase in phases) == phases[-1].memory.activations


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--save", "quarter"], "--save 'quarter' is not a share"),
        (["--save", "90%"], "save at most"),
        (["--save", "best", "--set", "raptr_ds.model.architecture=bert"], "no law for bert"),
        (["--save", "best", "--tokens", "many"], "is not a number of tokens"),
        (["--save", "25%", "--tokens", "1e9"], "--tokens goes with --save best"),
        (["--processes", "0"], "at least one process"),
        (["--tflops", "-1"], "must be above 0"),
        (["--processes", "7"], "must be a multiple"),
        (["--micro-batches", "--processes", "2", "--set", f"{PIPELINE}=2"], "Set pipeline_model_parallel_size to 1"),
    ],
)
def test_mistakes_end_with_one_message_and_code_2(monkeypatch, capsys, arguments, message):
    code, out, err = plan(monkeypatch, capsys, *arguments, "--set", NOT_PREPARED)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("error:") == 1


def test_a_reader_that_goes_away_is_no_traceback():
    """As `... | head` does; the pipe is closed before the tool prints."""
    read, write = os.pipe()
    command = [sys.executable, "tools/plan.py", "deepspeed_configs/bert_base_raptr.json"]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=write, stderr=subprocess.PIPE, text=True) as tool:
        os.close(read)
        os.close(write)
        errors = tool.communicate(timeout=120)[1]
    assert (tool.returncode, errors) == (141, "")
