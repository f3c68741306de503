"""Advice and the planning tool: a wasteful layout gets advice, a good one none, and mistakes end with a message."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import hjson
import pytest

from raptr_ds.config.load import load_run_config
from raptr_ds.planner.advice import advice
from raptr_ds.planner.plan import keepable_layers, plan_run
from raptr_ds.planner.setting import setting_of
from raptr_ds.planner.shortage import MemoryNeed
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


@pytest.mark.parametrize(
    ("keys", "advised_of"),
    [
        (["schedule=3-24", "fixed_layers=[0,1,-1]"], "3 does not divide by 4 stages. 4 layers would."),
        (["schedule=21-24"], "21 does not divide by 4 stages. 20 or 24 layers would."),
        (["schedule=21-22"], "21 does not divide by 4 stages. 20 layers would."),
    ],
)
def test_lengths_that_a_path_cannot_have_are_not_advised(keys, advised_of):
    path = [f"raptr_ds.path.{key}" for key in ("sampling=balanced", *keys)]
    layers = "raptr_ds.model.num_layers=" + ("22" if keys == ["schedule=21-22"] else "24")
    lines = advised(f"{PIPELINE}=4", layers, *path)
    assert any(advised_of in line for line in lines), lines


def test_of_narrow_layers_the_length_of_paths_is_advised_on_not_their_work():
    settings = [f"{PIPELINE}=4", "raptr_ds.path.sampling=balanced", "raptr_ds.train.compile=false"]
    settings += ["raptr_ds.model.num_attention_heads=16", "raptr_ds.path.schedule=12-24"]
    settings += ["raptr_ds.path.width_schedule=8-16"]  # the work of 6 layers
    assert not any("does not divide" in line for line in advised(*settings))


def test_without_a_pipeline_nothing_is_wasted():
    assert advised() == []


def plan(monkeypatch, capsys, *arguments, run_file=RUN_FILE):
    """Run tools/plan.py in this process and return its exit code, output and errors."""
    monkeypatch.setattr(sys, "argv", ["plan.py", str(run_file), *arguments])
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
    assert (
        "by a law fitted to 43 mean losses of 5 small models (residual 0.035; docs/results.md); numbers are for" in out
    )
    assert "than twelve layers by any schedule (docs/results.md, Shallower models)" in out
    assert "12 layers of width 128. Here the layers have 1,529M parameters" in out
    assert "the largest model measured has 2.6M parameters in its layers, this one 597 times as many" in out
    assert out.count("extrapolated") == 1
    small = ["num_layers=12", "hidden_size=128", "num_attention_heads=4", "ffn_hidden_size=352"]
    code, out, _ = plan(monkeypatch, capsys, *best, *(f"raptr_ds.model.{one}" for one in small), "--tokens", "1e6")
    assert code == 0
    assert "extrapolated" not in out
    code, out, _ = plan(monkeypatch, capsys, *best, "--tokens", "1e8")
    assert code == 0
    assert "**extrapolated**: the shortest standard run measured saw 0.08 tokens for each parameter" in out
    code, out, _ = plan(monkeypatch, capsys, *best)  # the tokens of the run file
    assert code == 0
    assert "**extrapolated**: the longest standard run measured saw 10.9 tokens" in out
    assert "neither is better than standard training with 95% confidence; proposing the paper's schedule because" in out
    assert "proposed: raptr_ds.path.schedule=paper" in out


def test_without_measured_runs_there_is_no_law(monkeypatch, capsys):
    monkeypatch.setattr("raptr_ds.planner.results.read_results.__defaults__", (Path("nowhere"),))
    code, _, err = plan(monkeypatch, capsys, "--processes", "8", "--save", "best", "--set", NOT_PREPARED)
    assert code == 2
    assert "gives no law (0 runs do not determine the law's 3 parameters)" in err


@pytest.mark.parametrize(
    ("gib", "holds"),
    [
        (10, "do not hold the run: it needs 29.41 GiB even with all layers recomputed"),
        (34, "hold 13 active layers of a pipeline stage without recomputation, of 24"),
        (90, "hold the full path without recomputation"),
    ],
)
def test_the_tool_warns_of_a_device_that_is_too_small(monkeypatch, capsys, gib, holds):
    code, out, _ = plan(monkeypatch, capsys, "--device-memory", str(gib), "--set", NOT_PREPARED)
    assert code == 0
    assert f"- {gib} GiB {holds}" in out
    fits = gib == 90
    assert ("**Warning.** By the plan the fullest rank needs" not in out) is fits
    assert ("activation_checkpointing=true (a third more work)" not in out) is fits


@pytest.mark.parametrize(("gib", "holds"), [(8, "hold"), (4, "do not hold")])
def test_micro_batches_of_phases_are_held_or_not(monkeypatch, capsys, gib, holds):
    """The table's peak, 7.4 GiB, is of no phase with the full path and the largest micro batch."""
    settings = ["train_micro_batch_size_per_gpu=64", "raptr_ds.parallel.micro_batches=[64,32,32,16]"]
    settings += ["raptr_ds.path.full_warmup_ratio=0", NOT_PREPARED]
    arguments = ["--processes", "1", "--device-memory", str(gib), "--set", *settings]
    code, out, _ = plan(monkeypatch, capsys, *arguments, run_file=RUN_FILE.with_name("bert_base_raptr.json"))
    assert code == 0
    assert f"- {gib} GiB {holds} the run's micro_batches" in out


def test_as_many_layers_as_the_tool_says_are_kept_in_a_devices_memory():
    on = "raptr_ds.parallel.activation_checkpointing=true"
    config = load_run_config(RUN_FILE, [VOCAB, on, "raptr_ds.path.schedule=6-12-18-24"], 1)
    count = keepable_layers(path_method_of(config), setting_of(config, Device()), 34 << 30)
    needed = {
        kept: MemoryNeed.fullest(
            load_run_config(
                RUN_FILE,
                [VOCAB, on, f"raptr_ds.parallel.keep_activations_up_to={kept}", f"raptr_ds.path.schedule={kept}-24"],
                1,
            )
        ).memory.total
        for kept in range(2, 24)
    }
    assert count == max(kept for kept, need in needed.items() if need <= 34 << 30)


def test_a_saving_counts_what_is_recomputed(monkeypatch, capsys):
    """Short paths that keep their activations save more than their layers."""
    kept = ["raptr_ds.parallel.activation_checkpointing=true", "raptr_ds.parallel.keep_activations_up_to=18"]
    code, out, _ = plan(monkeypatch, capsys, "--save", "25%", "--set", NOT_PREPARED, *kept)
    assert code == 0
    saved = re.search(r"executed, ([\d.]+)% less", out)
    assert saved is not None
    assert float(saved[1]) == pytest.approx(25, abs=1)


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
        (["--save", "90%"], "set raptr_ds.path.schedule=half, which saves 45.6%"),
        (["--device-memory", "nan"], "--device-memory/--memory: 'nan' must be a number above 0"),
        (["--device-memory", "inf"], "'inf' must be a number above 0"),
        (["--device-memory", "0"], "'0' must be a number above 0"),
        (["--device-memory", "-5"], "'-5' must be a number above 0"),
        (["--micro-batches", "--save", "25%", "--device-memory", "8"], "remove --save and --device-memory"),
        (["--save", "best", "--set", "raptr_ds.model.architecture=bert"], "no law for bert"),
        (["--save", "best", "--tokens", "many"], "is not a number of tokens"),
        (["--save", "25%", "--tokens", "1e9"], "--tokens goes with --save best"),
        (["--processes", "0"], "--processes: '0' must be a whole number"),
        (["--tflops", "-1"], "--tflops: '-1' must be a number above 0"),
        (["--processes", "7"], "must be a multiple"),
        (["--micro-batches", "--processes", "2", "--set", f"{PIPELINE}=2"], "Set pipeline_model_parallel_size to 1"),
        (["--micro-batches", "--set", 'raptr_ds.path={"method": "pld"}'], "micro_batches=[1] has no use with"),
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
