"""tools/bench.py on a tiny model: it runs, compares like with like, and says what it cannot compare."""

import json
import re
import runpy
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from raptr_ds.bench.ours import measured_path
from raptr_ds.bench.report import table
from raptr_ds.bench.samples import Measured
from raptr_ds.config.load import load_run_config
from raptr_ds.config.run import RunConfig
from raptr_ds.data.tokenizer import Tokenizer
from raptr_ds.errors import ConfigError, DataError
from raptr_ds.paths.stages import stage_layers

ROOT = Path(__file__).parents[3]
TINY = ["train_batch_size=4", "train_micro_batch_size_per_gpu=2", "raptr_ds.model.num_layers=4"]
SMALL = ["raptr_ds.model.hidden_size=32", "raptr_ds.model.seq_length=16"]


def bench(architecture: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    tool, config = ROOT / "tools" / "bench.py", ROOT / "deepspeed_configs" / f"{architecture}_quickstart.json"
    command = [sys.executable, str(tool), "--config", str(config), "--random-tokens", "90", "--repetitions", "1"]
    return subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


def rows_of(report: str) -> list[list[str]]:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines() if "|" in line]
    return rows[2:]


def check_table(folder: Path, architecture: str, precision: str, *more: str, layouts: tuple[str, ...] = ()) -> str:
    """Make a report and a plot, check both, and return the report."""
    report, plot = folder / "report.md", folder / "plot.png"
    options = ["--precision", precision, "--output", str(report), "--plot", str(plot), *more]
    done = bench(architecture, *options, "--set", *TINY, *SMALL)
    assert done.returncode == 0, done.stderr
    text = report.read_text()
    assert [row[:3] for row in rows_of(text)] == [
        ["raptr_ds", "one process", "4"],
        ["raptr_ds", "one process", "3"],
        ["raptr_ds", "one process", "2"],
        ["Hugging Face + DeepSpeed", "one process", "4"],
        ["megatron-core layers + DeepSpeed", "one process", "4"],
        *(["raptr_ds", layout, length] for layout in layouts for length in "432"),
    ]
    assert all(float(row[3]) > 0 for row in rows_of(text))
    losses = re.search(r"raptr_ds ([\d.]+), Hugging Face \+ DeepSpeed ([\d.]+), megatron-core.* ([\d.]+)$", text, re.M)
    assert losses is not None
    ours, *others = map(float, losses.groups())
    # The same weights and batch; bf16 rounds where each stack's own order of operations lets it.
    assert all(abs(ours - theirs) < (2e-5 if precision == "fp32" else 2e-2) for theirs in others)
    assert f"precision {precision}" in text
    assert 0 < plot.stat().st_size < 150_000
    return text


def test_a_table_with_our_paths_and_the_others(tmp_path: Path) -> None:
    check_table(tmp_path, "ul2", "bf16")


@pytest.mark.slow
def test_a_table_with_layouts_and_preparation(tmp_path: Path) -> None:
    """Several processes are started from here; tokenizing is compared on a text of one's own."""
    from raptr_ds.prepare.corpus import FileSource
    from raptr_ds.prepare.readers import ReadingOptions
    from raptr_ds.prepare.tokenizer_training import TokenizerSettings, train_tokenizer

    text, tokenizer = tmp_path / "text.jsonl", tmp_path / "tokenizer.model"
    lines = [f"line {number} of a text about {number % 7} things" for number in range(400)]
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    source = FileSource(text, ReadingOptions())
    train_tokenizer([source], TokenizerSettings(vocab_size=300, num_sentinels=2)).save(tokenizer)
    more = ["--layouts", "TP2", "PP2", "--text", str(text), "--tokenizer", str(tokenizer)]
    report = check_table(tmp_path, "bert", "fp32", *more, layouts=("TP2", "PP2"))
    assert "tokenizing and indexing on one core: raptr_ds" in report


def test_what_checks_a_text_leaves_megatrons_fused_functions_to_be_compiled() -> None:
    """Whatever imports the trainer's layers first switches their compiler off, and the rival's row would be slower."""
    program = "import sys, raptr_ds.bench.preparation; print([name for name in sys.modules if 'megatron' in name])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def run_file(*overrides: str, world_size: int = 1) -> RunConfig:
    return load_run_config(ROOT / "deepspeed_configs" / "bert_quickstart.json", overrides, world_size)


@pytest.mark.parametrize("stages", [[8], [4, 4], [3, 3, 2]])
def test_the_benchmarks_paths_are_as_even_over_the_stages_as_can_be(stages: list[int]) -> None:
    parallel = f"raptr_ds.parallel.pipeline_model_parallel_size={len(stages)}"
    layers = f"raptr_ds.parallel.pipeline_layers={stages}"
    config = run_file(parallel, layers, "raptr_ds.model.num_layers=8", world_size=len(stages))
    for length in range(1, 9):
        path = measured_path(config, length, np.random.default_rng(length))
        assert path.length == path.work == length
        counts = [len(path.active_in(stage)) for stage in stage_layers(stages)]
        assert max(counts) - min(counts) <= 1, counts


def test_widths_take_the_place_of_lengths() -> None:
    done = bench("bert", "--set", *TINY, *SMALL, "raptr_ds.path.method=width", "raptr_ds.train.compile=false")
    assert done.returncode == 0, done.stderr
    assert [row[2] for row in rows_of(done.stdout) if row[0] == "raptr_ds"] == ["4", "3", "2"]
    config = run_file(
        "raptr_ds.path.method=width", "raptr_ds.model.num_layers=3", "raptr_ds.model.num_attention_heads=4"
    )
    path = measured_path(config, 2.25, np.random.default_rng(1))
    assert path.work == 2.25
    assert path.parts is not None
    assert {len(heads) for heads in (*path.parts.heads, *path.parts.blocks)} == {3}


def test_a_model_without_a_twin_is_measured_without() -> None:
    done = bench("ul2", "--set", *TINY, *SMALL, "raptr_ds.model.normalization=layernorm")
    assert done.returncode == 0, done.stderr
    assert "no row for Hugging Face + DeepSpeed: LlamaForCausalLM" in done.stdout
    assert "| Hugging Face" not in done.stdout


@pytest.mark.parametrize(
    ("said", "outcome"),
    [("torch.OutOfMemoryError: CUDA out of memory. Tried", "a row"), ("ValueError: something else", "a mistake")],
)
def test_a_layout_that_runs_out_of_memory_has_a_row(monkeypatch: pytest.MonkeyPatch, said: str, outcome: str) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    tool = runpy.run_path(str(ROOT / "tools" / "bench.py"))
    failed = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(subprocess, "run", lambda *_arguments, **_options: failed)
    ratios = {"speed_up": 1.0, "by_flops": 1.0, "reached": {"value": 1.0, "low": 1.0, "high": 1.0}}
    full = {**asdict(Measured("raptr_ds", "one process", 4, 100, [1.0])), "median_seconds": 1.0, **ratios}
    if outcome == "a mistake":
        with pytest.raises(ConfigError, match="TP2 failed: ValueError"):
            tool["_rows_of_layout"]("TP2", full)
        return
    rows = tool["_rows_of_layout"]("tp2", full)
    assert table(rows)[2:] == ["| raptr_ds | TP2 | 4 | out of memory | | | 1.000 | | | | |"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--repetitions", "0"], "--repetitions: '0' must be"),
        (["--layouts", "DP2"], "written as TP2, PP4 or TP2PP2"),
        (["--layouts", "TP0"], "written as TP2, PP4 or TP2PP2"),
        (["--layout", "TP2"], "unrecognized arguments: --layout TP2"),
        (["--plot", "picture.txt"], "--plot picture.txt: a picture's file ends in"),
        (["--plot", "README.md/picture.png"], "README.md/picture.png cannot be written"),
        (["--json", "README.md/rows.json"], "README.md/rows.json cannot be written"),
        (["--output", "tools"], "--output tools is a folder: name a file in it, such as tools/report.md"),
        (["--tokenizer", "x.model"], "--tokenizer goes with --text"),
        (["--text", "no/such.jsonl"], "no/such.jsonl does not exist"),
        (["--text", "README.md"], "README.md, line 1: not JSON"),
    ],
)
def test_what_cannot_be_measured_is_a_mistake(arguments: list[str], says: str) -> None:
    done = bench("bert", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("given", ["no/such.model", "README.md"])
def test_a_bad_tokenizer_is_found_before_anything_is_measured(tmp_path: Path, given: str) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "one"}\n')
    done = bench("bert", "--text", str(text), "--tokenizer", given)
    assert (done.returncode, done.stdout) == (2, "")
    assert given in done.stderr
    text.write_text('{"text": "one"}\n{"text": 2}\n')
    assert 'text.jsonl, line 2 has no "text"' in bench("bert", "--text", str(text)).stderr


def test_so_is_one_with_options_that_are_not_supported(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "spaces.model").write_bytes(tokenizer.model + b"\x1a\x02\x28\x00")
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    tool = runpy.run_path(str(ROOT / "tools" / "bench.py"))
    options = SimpleNamespace(text=tmp_path / "text.jsonl", tokenizer=tmp_path / "spaces.model")
    with pytest.raises(DataError, match=r"spaces\.model cannot be used: .* has escape_whitespaces=false"):
        tool["_tokenizer_of"](None, options)
