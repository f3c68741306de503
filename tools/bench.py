"""Measure a training step: python tools/bench.py [--config RUN_FILE] [--set KEY=VALUE ...] [--repetitions N].

Prints a Markdown table: step time at the full path, 3/4 and 1/2 of it, beside the speed-up that executed FLOPs promise;
the same model in Hugging Face transformers and with megatron-core's layers, both under plain DeepSpeed, with the same
weights and batch; waits for path agreement and loader; memory. All rows take turns, so that a busy machine disturbs
them equally; if a GPU cannot hold three models they are measured one after another, and the row of one that still does
not fit shows that. --layouts also measures our paths in several processes, --text tokenizing and indexing against
megatron's recipe. With raptr_ds.path.method=width the paths are shares of every layer's width. A launcher can start it
too: torchrun --nproc_per_node 2 tools/bench.py --set raptr_ds.parallel.tensor_model_parallel_size=2.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _command_line
import numpy as np
from _command_line import COUNT

from raptr_ds.config.load import load_run_config
from raptr_ds.config.run import RunConfig
from raptr_ds.data.manifest import TOKENIZER
from raptr_ds.errors import ConfigError
from raptr_ds.parallel.launch import Launch, detect_launch, prepare_imports
from raptr_ds.plots.pictures import check_picture
from raptr_ds.runtime.host_memory import keep_freed_memory, uncollected_imports
from raptr_ds.user_paths import check_output, is_folder

if TYPE_CHECKING:  # torch and the other stacks take 7 s to import: check the command line before
    from raptr_ds.data.batch import StepBatch
    from raptr_ds.data.loader import Loader

DEFAULT_CONFIG = Path(__file__).parent.parent / "deepspeed_configs" / "bert_quickstart.json"
DEFAULT_VOCAB_SIZE = 8192
_SIZES = {"TP": "tensor_model_parallel_size", "PP": "pipeline_model_parallel_size"}


def main() -> None:
    """Check the command line and the run file, then measure."""
    options = parse()
    launch = detect_launch()
    overrides = [*options.set, *_precision_overrides(options.precision)]
    config = load_run_config(options.config, overrides, world_size=launch.world_size)
    if config.precision == "fp16":
        raise ConfigError("the benchmark compares fp32 and bf16, not fp16. Add --precision bf16.")
    tokenizer = None if options.text is None else _tokenizer_of(config, options)
    measure(config, launch, options, tokenizer)


def _tokenizer_of(config: RunConfig, options: argparse.Namespace) -> Path:
    """Return the tokenizer's file; it and --text are checked before anything is measured. Raises: DataError."""
    from raptr_ds.bench.preparation import check_text
    from raptr_ds.data.loader import folders_of
    from raptr_ds.data.tokenizer import Tokenizer
    from raptr_ds.sentencepiece_model import read_sentencepiece_model

    check_text(options.text)
    path = Path(options.tokenizer or config.data.tokenizer or next(iter(folders_of(config.data.path))))
    path = path / TOKENIZER if is_folder(path) else path
    tokenizer = Tokenizer.load(path)
    read_sentencepiece_model(tokenizer.model, tokenizer.origin)
    return path


def measure(config: RunConfig, launch: Launch, options: argparse.Namespace, tokenizer: Path | None) -> None:
    """Measure, print and write the report. tokenizer: with which --text is tokenized."""
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with uncollected_imports():
        import torch

        prepare_imports(torch.cuda.is_available())
        import raptr_ds.bench.megatron_stack  # noqa: F401 - first, or its fused functions stay uncompiled
        from raptr_ds.bench.plot import plot_benchmark
        from raptr_ds.bench.preparation import measure_preparation
        from raptr_ds.bench.report import conclusions, describe, preparation_lines, rows_of, table
        from raptr_ds.bench.samples import CLOCKS
        from raptr_ds.bench.steps import Options, measure_steps
        from raptr_ds.parallel.groups import initialize_process_groups

    parallel = config.parallel
    groups = initialize_process_groups(
        launch,
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
    )
    if groups.device.type == "cpu":
        keep_freed_memory()  # as in training; the other stacks benefit too
    with contextlib.ExitStack() as stack:
        config, batch, loader, origin = _batch(config, options.random_tokens, groups.data_rank)
        if loader is not None:
            stack.enter_context(loader)
        how = Options(options.repetitions, options.clock, options.one_at_a_time, options.compile_others)
        result = measure_steps(config, groups, batch, how, loader)
    if launch.rank > 0:
        return
    rows = rows_of(result)
    for layout in options.layouts:
        rows += _rows_of_layout(layout, full=rows[0])
    lines = [*describe(config, result, groups.device, origin), "", *table(rows), "", *conclusions(result, rows)]
    if tokenizer is not None:
        times = measure_preparation(options.text, tokenizer, options.repetitions, CLOCKS[options.clock])
        lines += preparation_lines(times)
    report = "\n".join(lines) + "\n"
    print(report)
    if options.output is not None:
        options.output.write_text(report, encoding="utf-8")
    if options.json is not None:
        options.json.write_text(json.dumps(rows), encoding="utf-8")
    if options.plot is not None:
        plot_benchmark(rows, options.plot)


def parse() -> argparse.Namespace:
    """Parse and check the command line."""
    # A layout's processes get this command line again without some options, which are known by their full names.
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="run file (default: bert_quickstart)")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="as for training")
    parser.add_argument("--repetitions", type=COUNT, default=9, help="rounds that count (default 9)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: the run file's")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: the process's own time, for a busy machine"
    )
    parser.add_argument(
        "--one-at-a-time",
        action="store_true",
        help="build, measure and free each stack before the next (default: if the GPU cannot hold all)",
    )
    parser.add_argument("--compile-others", action="store_true", help="compile Hugging Face's model too")
    parser.add_argument("--random-tokens", type=COUNT, metavar="VOCAB_SIZE", help="instead of prepared data")
    parser.add_argument(
        "--layouts", nargs="+", action="extend", default=[], metavar="LAYOUT", help="also measured: TP2, PP2, TP2PP2"
    )
    parser.add_argument("--text", type=Path, help="a JSONL file to tokenize and index, against megatron's recipe")
    parser.add_argument("--tokenizer", type=Path, help="for --text (default: that of the run's data)")
    parser.add_argument("--output", type=Path, help="also write the report to this file")
    parser.add_argument("--plot", type=Path, help="draw the rows as a PNG")
    parser.add_argument("--json", type=Path, help="write the rows, with every sample")
    options = parser.parse_args()
    for layout in options.layouts:
        _sizes_of(layout)
    check_picture(options.plot, "--plot")
    check_output(options.output, "--output", "report.md")
    check_output(options.json, "--json", "rows.json")
    if options.tokenizer is not None and options.text is None:
        raise ConfigError("--tokenizer goes with --text.")
    return options


def _sizes_of(layout: str) -> dict[str, int]:
    """Return the sizes in a layout. Raises: ConfigError if it is not written as TP2, PP2 or TP2PP2."""
    parts = re.findall(r"(TP|PP)([1-9]\d*)", layout.upper())
    if not parts or "".join(name + size for name, size in parts) != layout.upper():
        raise ConfigError(f"--layouts {layout}: a layout is written as TP2, PP4 or TP2PP2.")
    return {name: int(size) for name, size in parts}


def _rows_of_layout(layout: str, full: dict[str, Any]) -> list[dict[str, Any]]:
    """Run this command in the processes of a layout, without --layouts and the options for reports; return its rows.

    full: our full path's row, from which a row is made if the processes run out of memory.
    """
    from raptr_ds.bench.report import row_without_memory

    sizes = _sizes_of(layout)
    processes = int(np.prod(list(sizes.values())))
    settings = [f"raptr_ds.parallel.{_SIZES[name]}={size}" for name, size in sizes.items()]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        kept = _without(sys.argv[1:], ("--layouts", "--text", "--tokenizer", "--output", "--plot", "--json"))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [*launcher, __file__, *kept, "--json", str(file), "--set", *settings]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not file.exists() and "out of memory" in done.stderr:
            return [row_without_memory(full, layout.upper())]
        if not file.exists():
            raise ConfigError(f"--layouts {layout} failed: {done.stderr[-2000:]}")
        return json.loads(file.read_text(encoding="utf-8"))


def _without(arguments: Sequence[str], options: Sequence[str]) -> list[str]:
    """Return command line arguments without some options and their values."""
    kept: list[str] = []
    is_removed = False
    for argument in arguments:
        if argument.startswith("--"):
            is_removed = argument.split("=")[0] in options
        if not is_removed:
            kept.append(argument)
    return kept


def _precision_overrides(precision: str | None) -> list[str]:
    if precision is None:
        return []
    return [f"bf16.enabled={str(precision == 'bf16').lower()}", "fp16.enabled=false"]


def _batch(
    config: RunConfig, random_vocab_size: int | None, data_rank: int
) -> tuple[RunConfig, StepBatch, Loader | None, str]:
    """Return the run with its vocabulary, a step's batch, the loader and their origin; prepared data if possible."""
    from raptr_ds.data.loader import are_prepared, build_loader, folders_of, load_tokenizer
    from raptr_ds.planner.random_batch import random_step_batch

    if random_vocab_size is None and are_prepared(config.data.path):
        tokenizer = load_tokenizer(config.data)
        config = config.with_vocab_size(tokenizer.vocab_size)
        loader = build_loader(
            config.data, config.objective, config.model, config.batch, seed=config.train.seed, dp_rank=data_rank
        )
        return config, loader.at(0), loader, f"text of {', '.join(folders_of(config.data.path))}"
    vocab_size = random_vocab_size or config.model.vocab_size or DEFAULT_VOCAB_SIZE
    config = config.with_vocab_size(vocab_size)
    return config, random_step_batch(config, data_rank), None, "random tokens"


if __name__ == "__main__":
    _command_line.run(main)
